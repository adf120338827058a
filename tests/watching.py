"""A program run under strace: which hosts it has spoken to, and which files it has changed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

_TRACED = "trace=%network,%file"
# One call: its name, its arguments, what came back (with -y a file descriptor is followed by its path).
_CALL = re.compile(r"^(\w+)\((.*)\)\s+= (-?\d+)(?:<(.*)>)?")
_ADDRESS = re.compile(
    r'sa_family=AF_INET6?, sin6?_port=htons\((\d+)\).*?inet_(?:addr|pton)\((?:AF_INET6, )?"([^"]+)"'
)
_CHANGING = re.compile(
    r"^(creat|mkdir|mknod|rename|link|symlink|unlink|rmdir|truncate|(f|l)?chmod|(l|f)?chown|utime|setxattr)"
)
_LOOPBACK = re.compile(r"^(127\.|::1$|::ffff:127\.)")
_NAME_SERVICE = 53  # behind a server on this machine stand others


@dataclass
class Watched:
    """What a program has done.

    Attributes:
        exit_code: of the program.
        output: both streams.
        hosts: "address:port" of everything outside this machine that was connected to or sent something.
        changed: files and folders that were made, written, renamed or removed.
    """

    exit_code: int
    output: str
    hosts: set[str] = field(default_factory=set)
    changed: set[Path] = field(default_factory=set)


@cache
def why_not() -> str | None:
    """Why nothing can be watched here; None where it can."""
    strace = shutil.which("strace")
    if strace is None:
        return "strace is not installed: nothing watches the network and the files (apt-get install strace)"
    done = subprocess.run([strace, "-f", "-o", "/dev/null", "true"], capture_output=True, check=False)
    if done.returncode != 0:
        return f"strace may not trace here: {done.stderr.decode(errors='replace').strip()}"
    return None


def traced(command: list[str], log: Path) -> list[str]:
    """The command line under strace, one file of ``log`` for each thread: lines are never cut in two."""
    options = ["-ff", "-qq", "-y", "-s", "4096", "-e", _TRACED, "-e", "signal=none", "-o", str(log)]
    return [str(shutil.which("strace")), "--seccomp-bpf", *options, *command]


def watch(command: list[str], folder: Path, env: dict[str, str], stdin: str = "") -> Watched:
    """Run a command in a folder; its log is kept beside it."""
    log = folder.parent / f"{folder.name}.trace" / "thread"
    log.parent.mkdir()
    done = subprocess.run(
        traced(command, log),
        cwd=folder,
        env=env,
        input=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=240,
    )
    return read(log, folder, Watched(done.returncode, done.stdout))


def read(log: Path, folder: Path, watched: Watched) -> Watched:
    """Add what a log says of a program that ran in ``folder``."""
    logs = list(log.parent.glob(f"{log.name}.*"))
    assert logs, "strace has written nothing"
    for path in logs:
        for line in path.read_text(errors="replace").splitlines():
            call = _CALL.match(line)
            if call is not None:
                _take(call, folder, watched)
    return watched


def _take(call: re.Match[str], folder: Path, watched: Watched) -> None:
    name, arguments, returned, opened = call.groups()
    if name in ("connect", "sendto", "sendmsg", "sendmmsg"):
        for port, address in _ADDRESS.findall(arguments):  # also where it failed: it was tried
            if int(port) == _NAME_SERVICE or not _LOOPBACK.match(address):
                watched.hosts.add(f"{address}:{port}")
    elif int(returned) < 0:
        return
    elif name in ("open", "openat", "openat2") and re.search(r"O_WRONLY|O_RDWR|O_CREAT|O_TRUNC", arguments):
        watched.changed.add(Path(opened))
    elif _CHANGING.match(name):
        for base, path in re.findall(r'(?:<([^>]*)>, )?"((?:[^"\\]|\\.)*)"', arguments):
            watched.changed.add(Path(os.path.normpath(Path(base or folder) / path)))


def foreign(watched: Watched, *own: Path) -> set[Path]:
    """Of the changed files those that are nobody's of ``own``; devices and Python's compiled files apart."""
    mine = {
        path
        for path in watched.changed
        if not any(path.is_relative_to(folder) for folder in (*own, Path("/dev"), Path("/proc")))
    }
    return {path for path in mine if "__pycache__" not in path.parts}


def python(code: str, *arguments: object) -> list[str]:
    """A command line that runs Python code."""
    return [sys.executable, "-c", code, *map(str, arguments)]
