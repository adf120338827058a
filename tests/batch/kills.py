"""A batch that is killed before any of its steps on the disk, in a process of its own for each."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

# What changes files. Writing into an open file is none of these: its callers are wrapped.
_STEPS = frozenset(
    {"open", "os.rename", "os.remove", "os.link", "os.truncate", "os.mkdir", "os.rmdir", "fcntl.flock"}
)


def killed_at(step: int, folder: Path, work: Callable[[], None]) -> bool:
    """Run ``work`` in another process, killed before its step number ``step`` in ``folder``.

    Returns:
        False where it came to its end before.
    """
    child = os.fork()
    if child == 0:
        _be_killed_at(step, str(folder))
        try:
            work()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(3)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def _be_killed_at(step: int, folder: str) -> None:
    left = step

    def one() -> None:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event not in _STEPS:
            return
        where = arguments[0]
        if isinstance(where, str | bytes | os.PathLike) and not os.fsdecode(where).startswith(folder):
            return
        if event == "open" and not _changes(arguments):
            return
        one()

    sys.addaudithook(hook)
    import qrun.batch.journal
    import qrun.batch.outputs

    for owner, name in (
        (qrun.batch.journal.Journal, "add"),
        (qrun.batch.outputs.Growing, "_write"),
    ):
        setattr(owner, name, _after(getattr(owner, name), one))


def _after(method: Callable[..., object], then: Callable[[], None]) -> Callable[..., object]:
    def wrapped(*given, **named):
        method(*given, **named)
        then()

    return wrapped


def _changes(arguments: tuple[object, ...]) -> bool:
    return bool(int(arguments[2]) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
