"""If these fail, a full disk, a closed stream or an odd file name ends in a traceback, not in one message."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest

import qrun as api
from qrun.errors import QrunError

QRUN = "import sys; from qrun.cli.main import main; sys.argv[0] = 'qrun'; main()"
QCONVERT = QRUN.replace("qrun.cli.main", "qconvert.cli").replace("'qrun'", "'qconvert'")


def command(program: str, *arguments: object) -> list[str | bytes]:
    texts = [a if isinstance(a, bytes) else str(a) for a in arguments]
    return [sys.executable, "-c", program, *texts]


def in_shell(
    redirection: str, program: str, *arguments: object, **more
) -> subprocess.CompletedProcess[bytes]:
    """Run a command with its streams redirected as a shell does it."""
    line = ["sh", "-c", f'exec "$@" {redirection}', "sh", *command(program, *arguments)]
    return subprocess.run(line, capture_output=True, check=False, timeout=60, **more)


def one_message(done: subprocess.CompletedProcess[bytes]) -> str:
    """The single message on stderr of a refused command."""
    message = done.stderr.decode()
    assert done.returncode == 1, message
    assert message.count("error:") == 1, message
    assert "Traceback" not in message
    assert "Exception ignored" not in message
    return message


@pytest.mark.parametrize("program", [QRUN, QCONVERT])
@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("--no-such-option",)])
def test_a_full_output_is_one_message(program, arguments):
    if arguments == ("--no-such-option",):
        assert in_shell("2>/dev/full", program, *arguments).returncode in (1, 2)
        return
    assert "the output cannot be written: No space" in one_message(
        in_shell(">/dev/full", program, *arguments)
    )
    assert "standard output is closed" in one_message(in_shell(">&-", program, *arguments))


@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_where_messages_cannot_be_written_the_exit_code_still_tells(redirection):
    done = in_shell(redirection, QRUN, "info", "/nowhere")
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"Traceback" not in done.stderr


def test_an_answer_into_a_full_disk_is_one_message(tiny_export):
    given = ("generate", "--engine", tiny_export, "--prompt", "hi", "--greedy", "--max-tokens", 3)
    for more in ((), ("--json",)):
        assert "cannot be written" in one_message(in_shell(">/dev/full", QRUN, *given, *more))
    assert "cannot be written" in one_message(in_shell(">/dev/full", QRUN, "info", tiny_export))


def test_a_closed_input_is_an_empty_one(tiny_export):
    done = in_shell("<&-", QRUN, "generate", "--engine", tiny_export, "--prompt", "-")
    assert "the prompt is empty" in one_message(done)
    assert in_shell("<&-", QRUN, "chat", "--engine", tiny_export).returncode == 0


@pytest.mark.parametrize("program", [QRUN, QCONVERT])
def test_a_working_directory_that_is_gone_is_no_traceback(program, tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    verb = "info" if program == QRUN else "inspect"
    line = ["sh", "-c", 'cd "$0" && rmdir "$0" && exec "$@"', str(gone), *command(program, verb, "model")]
    done = subprocess.run(line, capture_output=True, check=False)
    assert b"Traceback" not in done.stderr
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("~nosuchuser/model", "names a home folder that does not exist"),
        ("loop", "symbolic links"),
        ("n" * 300, "name too long"),
        ("file/model", "no such model folder"),
    ],
)
def test_a_name_that_leads_to_no_file_is_refused_in_one_message(name, says, tmp_path, monkeypatch):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    for arguments in (("info", name), ("generate", "--engine", name, "--prompt", "hi")):
        assert says in one_message(in_shell("", QRUN, *arguments, cwd=tmp_path)).lower()
    with pytest.raises(QrunError, match=r"(?i)" + says):
        api.open(name)


# What a locale of ASCII or Latin-1 makes of names, without Python's own rescue.
ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


@pytest.mark.parametrize("locale", [{}, ASCII])
@pytest.mark.parametrize("name", ["模型 ü".encode(), b"\xff\xe9", b"m[/x]", b"[bold]m"])
def test_a_folder_answers_whatever_its_name(name, locale, tiny_export, tmp_path):
    folder = tmp_path / os.fsdecode(name)
    folder.parent.mkdir(exist_ok=True)
    folder.symlink_to(tiny_export)
    env = {**os.environ, **locale}
    given = command(
        QRUN, "generate", "--engine", os.fsencode(folder), "--prompt", "hi", "--max-tokens", 2, "--json"
    )
    done = subprocess.run(given, capture_output=True, check=False, env=env)
    assert (done.returncode, done.stderr) == (0, b"")
    done = subprocess.run(
        command(QRUN, "info", os.fsencode(folder)), capture_output=True, check=False, env=env
    )
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("name", ["m[/x]", "[bold]m", "m[link=x]"])
def test_brackets_in_a_path_are_no_markup_in_a_terminal(name, tiny_export, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).symlink_to(tiny_export)
    given = ("generate", "--engine", tmp_path / name, "--prompt", "hi", "--max-tokens", 2, "--check-hashes")
    out, status = _in_terminal(command(QRUN, *given))
    assert status == 0, out
    assert "Traceback" not in out


def _in_terminal(arguments: list[str | bytes]) -> tuple[str, int | None]:
    program, *rest = [os.fsdecode(a) for a in arguments]
    process = pexpect.spawn(program, rest, dimensions=(24, 80), encoding="utf-8", timeout=60, use_poll=True)
    out = process.read()
    process.close()
    return out, process.exitstatus


@pytest.mark.parametrize("home", ["", "nowhere", None])
def test_a_chat_without_a_home_keeps_its_history_to_itself(home, tmp_path, monkeypatch):
    from prompt_toolkit.history import InMemoryHistory

    from qrun.cli.lines import _history

    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    if home is None:
        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    else:
        monkeypatch.setenv("HOME", home)
    assert isinstance(_history(), InMemoryHistory)
    assert list(tmp_path.iterdir()) == []


def test_a_relative_state_folder_is_not_taken(tmp_path, monkeypatch):
    from qrun.folder.paths import own_folder

    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert own_folder("XDG_STATE_HOME", ".local/state") == tmp_path / ".local" / "state"
