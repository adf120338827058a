"""Whatever ends an export, its output folder is the complete old one, the complete new one, or absent."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]


def kill(checkpoint: Path, output: Path, kills: int, how: str) -> Counter[str]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.qconvert.kill_exports", checkpoint, output, str(kills), how, "1"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr  # a torn folder ends the script with an error
    first, *states = done.stdout.split("\n")[:-1]
    assert first == "complete"
    assert len(states) == kills
    return Counter(states)


def test_fifty_exports_killed_at_random_moments_leave_nothing_half_done(tied: Path, tmp_path: Path) -> None:
    states = kill(tied, tmp_path / "model", 50, "SIGKILL")
    assert set(states) <= {"complete killed", "complete finished"}  # the old folder never goes away
    assert states["complete killed"] >= 10, states  # else the kills came too late to prove anything


@pytest.mark.parametrize("how", ["SIGINT"])
def test_interrupted_exports_clean_up_after_themselves(tied: Path, tmp_path: Path, how: str) -> None:
    states = kill(tied, tmp_path / "out" / "model", 10, how)
    assert states["complete killed"] >= 2, states
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model"]


def test_sigterm_ends_the_command_with_its_own_code_and_leaves_nothing(tied: Path, tmp_path: Path) -> None:
    """As a shutdown, a container's stop or ``timeout`` ends a command."""
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "qconvert.cli",
        "export",
        str(tied),
        "-q",
        "--output",
        str(out / "model"),
    ]
    with subprocess.Popen(command) as process:
        deadline = time.monotonic() + 120
        while not list(out.glob(".model.tmp-*")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.terminate()
        assert process.wait(120) == 128 + signal.SIGTERM
    assert not out.exists()
