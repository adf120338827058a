"""If one of these fails, a killed export fills /tmp, or the next one removes what is not left over."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from qconvert.checkpoint.gguf import scratch
from qconvert.checkpoint.gguf.marker import PREFIX
from tests.qconvert.ggufs import make_gguf

READ_AND_WAIT = """
import sys
from qconvert.checkpoint.hub import resolve_source
print(resolve_source(sys.argv[1]), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made, of this process and of those that it starts."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return make_gguf(tmp_path)[1]


@pytest.fixture
def reader(temporary: Path, file: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process that has opened a GGUF file, and its folder of all its files."""
    command = [sys.executable, "-c", READ_AND_WAIT, str(file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        assert (folder / "config.json").is_file()
        assert folder.parent.parent.parent == temporary
        yield process, folder.parent.parent
        process.kill()


def test_what_a_killed_process_has_left_goes_and_its_file_stays(
    reader: tuple[subprocess.Popen[str], Path], file: Path
) -> None:
    """SIGKILL left a folder in /tmp for each export of a GGUF file."""
    process, root = reader
    content = file.read_bytes()
    scratch.remove_leftovers()
    assert root.is_dir()  # alive
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert root.is_dir()
    scratch.remove_leftovers()
    assert not root.exists()
    assert file.read_bytes() == content


def test_the_next_start_removes_it(reader: tuple[subprocess.Popen[str], Path], file: Path) -> None:
    process, root = reader
    process.send_signal(signal.SIGKILL)
    process.wait()
    command = [sys.executable, "-c", READ_AND_WAIT, str(file)]
    done = subprocess.run(command, input="", capture_output=True, text=True, check=True)
    assert not root.exists()
    assert not Path(done.stdout.strip()).exists()  # a process that ends by itself removes its own


def test_what_a_user_put_there_stays(reader: tuple[subprocess.Popen[str], Path], temporary: Path) -> None:
    process, root = reader
    process.send_signal(signal.SIGKILL)
    process.wait()
    mine = next(root.glob(f"{PREFIX}*/*")) / "notes.txt"
    mine.write_text("mine")
    (temporary / f"{PREFIX}mine").mkdir()
    (temporary / f"{PREFIX}mine" / "notes.txt").write_text("mine")
    (temporary / f"{PREFIX}link").symlink_to(root)
    scratch.remove_leftovers()
    assert mine.read_text() == "mine"
    assert (temporary / f"{PREFIX}mine" / "notes.txt").read_text() == "mine"
    assert (temporary / f"{PREFIX}link").is_symlink()
