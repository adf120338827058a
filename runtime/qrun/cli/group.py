"""The one place where an error of any command becomes one message and an exit code.

``qrun`` and ``qconvert`` are both a ``CommandGroup``: 0 done, 1 refused or failed, 2 wrong usage, 130 Ctrl-C.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any, NoReturn

import click

from qrun.cli.terminal import complain
from qrun.errors import QrunError, as_refusal


class CommandGroup(click.Group):
    """A group whose commands may raise ``QrunError`` and errors of the system.

    A reader that leaves early (``| head``) is no error: click ends the program quietly.
    """

    def main(self, *args: Any, **extra: Any) -> Any:
        _prepare_streams()
        try:
            try:
                return super().main(*args, **extra)
            except SystemExit:
                # Flush here: a failure while the interpreter exits would print a traceback.
                sys.stdout.flush()
                raise
        except BrokenPipeError:
            _silence(sys.stdout)
            sys.exit(1)
        except (QrunError, OSError, UnicodeError, MemoryError) as error:
            _fail(error)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            self.interrupted()
            sys.exit(130)

    def interrupted(self) -> None:
        """What is said after Ctrl-C; nothing unless a group has something to say."""


def _prepare_streams() -> None:
    """Replace closed standard streams, and let a locale that lacks a character replace it instead of failing.

    In the order of their numbers: a file that is opened gets the lowest free one, so that nothing else is
    ever opened under the number of a closed stream and overwritten by what a library prints.
    """
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115, PTH123
    closed = sys.stdout is None
    if closed:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    if closed:
        _fail(
            QrunError(
                "standard output is closed: there is nowhere to write to",
                hint="redirect it to a file, or to /dev/null if nobody reads it",
            )
        )


def _fail(error: BaseException) -> NoReturn:
    refusal = as_refusal(error)
    assert refusal is not None
    with contextlib.suppress(OSError):  # if stderr cannot be written either, only the exit code tells
        complain(refusal)
        sys.stderr.flush()
    for stream in (sys.stdout, sys.stderr):
        if _cannot_be_written(stream):
            _silence(stream)
    sys.exit(1)


def _cannot_be_written(stream: Any) -> bool:
    """Whether flushing fails: a stream keeps what it could not write, and tries it again."""
    try:
        stream.flush()
    except OSError:
        return True
    return False


def _silence(stream: Any) -> None:
    """Point a stream at the null device, so that the interpreter's last flush succeeds."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
