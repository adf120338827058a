"""If these fail, a job of hours shows nothing, or lines that a terminal of 80 columns breaks."""

from __future__ import annotations

import subprocess
import sys

import pexpect
import pyte

from tests.batch.jobs import request, write_lines
from tests.fakes import REPOSITORY


def test_a_line_of_progress_fits_a_terminal_and_goes_away(tmp_path):
    lines = [request(f"{n}", f"say {n} " * 5, **({"nonsense": 1} if n == 3 else {})) for n in range(40)]
    source = write_lines(tmp_path / "in.jsonl", lines)
    arguments = ["-m", "tests.batch.fake_command", str(source), "--output", str(tmp_path / "out.jsonl")]
    screen = pyte.Screen(80, 24)
    stream = pyte.Stream(screen)
    running = pexpect.spawn(
        sys.executable,
        [*arguments, "--rows", "2"],
        cwd=str(REPOSITORY),
        env={"QRUN_FAKE_STEP": "0.003", "TERM": "xterm", "PATH": ""},
        dimensions=(24, 80),
        encoding="utf-8",
        timeout=60,
    )
    seen: list[list[str]] = []
    while True:
        try:
            stream.feed(running.read_nonblocking(4096, timeout=60))
        except pexpect.EOF:
            break
        seen.append([line.rstrip() for line in screen.display if line.strip()])
    running.close()
    assert running.exitstatus == 0
    bars = [line for lines in seen for line in lines if line.startswith("answering")]
    assert any("/40 " in line and "tokens/s" in line and "1 errors" in line and ":" in line for line in bars)
    assert all(sum(line.startswith("answering") for line in lines) <= 1 for lines in seen)
    last = [line.rstrip() for line in screen.display if line.strip()]
    assert not any(line.startswith("answering") for line in last)
    assert any(line.startswith("40 lines: 39 answered, 1 with an error") for line in last)


def test_nothing_is_drawn_where_nobody_looks(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", [request("a", "hello")])
    command = [sys.executable, "-m", "tests.batch.fake_command", source, "--output", tmp_path / "out.jsonl"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "\x1b" not in done.stderr + done.stdout
    assert "answering" not in done.stderr
