"""The one error family of this project: what happened, where, and what to do about it."""

from __future__ import annotations

import errno
import os
from os import PathLike
from pathlib import Path


class QrunError(Exception):
    """A mistake in the input or the environment that the user can mend.

    The command line prints it without a traceback and exits with 1. A bug of ours is never a
    ``QrunError``: it is an assertion or an ordinary exception.

    Args:
        what: one sentence that says what is wrong, naming the bad value.
        where: the file (and key, tensor or line) in which it was found.
        hint: what to do next, as an instruction.
    """

    def __init__(
        self, what: str, *, where: str | PathLike[str] | None = None, hint: str | None = None
    ) -> None:
        self.what = what
        self.where = None if where is None else str(where)
        self.hint = hint
        super().__init__(str(self))

    def __str__(self) -> str:
        lines = [self.what]
        if self.where is not None:
            lines.append(f"  where: {self.where}")
        if self.hint is not None:
            lines.append(f"  what to do: {self.hint}")
        return "\n".join(lines)


_PERMISSIONS = "check the permissions of the file and of the folders above it"
_SPACE = "free some space, or choose another place"
_HINTS = {
    errno.EACCES: _PERMISSIONS,
    errno.EPERM: _PERMISSIONS,
    errno.EROFS: "it is read-only: choose another place",
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.ELOOP: "links lead in a circle: remove or correct them",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "close other files, or raise the limit with `ulimit -n`",
    errno.EIO: "check the disk, or the connection to it",
    errno.ENOTDIR: "check the path: a part of it is a file and not a folder",
    errno.EISDIR: "give a file; this is a folder",
}


def as_refusal(error: BaseException) -> QrunError | None:
    """What the system refuses, said as one of our own errors; None where it is a bug of ours.

    Args:
        error: an exception that nobody has turned into a ``QrunError`` where it arose.

    Returns:
        A ``QrunError`` for errors of the system (files, memory) and of text that cannot be encoded.
    """
    if isinstance(error, QrunError):
        return error
    if isinstance(error, OSError):
        return _of_system(error)
    if isinstance(error, UnicodeError):
        return QrunError(
            f"a text or a name cannot be read or written in its encoding: {error}",
            hint="give names and texts in UTF-8, and use a UTF-8 locale (export LC_ALL=C.UTF-8)",
        )
    if isinstance(error, MemoryError):
        return QrunError(
            f"there is not enough memory{': ' if str(error) else ''}{error}",
            hint="close other programs, or choose a smaller model",
        )
    return None


def _of_system(error: OSError) -> QrunError:
    what = error.strerror or str(error) or type(error).__name__
    if error.errno == errno.ENOENT and error.filename is None and _working_folder_is_gone():
        return QrunError(
            "the working directory does not exist any more", hint="change to a folder that exists (cd)"
        )
    where = error.filename
    if where is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF):
        return QrunError(f"the output cannot be written: {what}", hint=_HINTS.get(error.errno or 0))
    if isinstance(where, bytes):
        where = os.fsdecode(where)
    absent = error.errno == errno.ENOENT and where is not None
    return QrunError(
        "there is no such file or folder" if absent else f"the system refuses: {what}",
        where=None if where is None or isinstance(where, int) else where,
        hint=_HINTS.get(error.errno or 0),
    )


def _working_folder_is_gone() -> bool:
    try:
        Path.cwd()
    except OSError:
        return True
    return False
