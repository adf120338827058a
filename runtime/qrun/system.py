"""What the operating system refuses, said in one way; and paths as a user types them."""

from __future__ import annotations

import errno
from pathlib import Path

from qrun.errors import QrunError

_PERMISSIONS = "check the permissions of the file and of the folders above it"
_SPACE = "free some space, or write to another disk"
# What to say and what to do, by errno. Others are told in the system's own words.
_REASONS: dict[int, tuple[str, str]] = {
    errno.EACCES: ("permission denied", _PERMISSIONS),
    errno.EPERM: ("permission denied", _PERMISSIONS),
    errno.EROFS: ("the file system is read-only", "write to another disk"),
    errno.ENOSPC: ("no space left on the disk", _SPACE),
    errno.EDQUOT: ("no space left in your quota", _SPACE),
    errno.ENOENT: ("there is no such file or folder", "check the path"),
    errno.ENOTDIR: ("a part of this path is a file and not a folder", "check the path"),
    errno.EISDIR: ("this is a folder and not a file", "check the path"),
    errno.ELOOP: ("links lead in a circle here", "check where the links point, with `ls -l`"),
    errno.ENAMETOOLONG: ("this name is too long for the file system", "choose a shorter name"),
    errno.EMFILE: ("too many files are open", "raise the limit with `ulimit -n`"),
    errno.EIO: ("the disk could not be read or written", "check the disk, and copy the files again"),
}


def from_os_error(error: OSError) -> QrunError:
    """An error of the operating system, as a user's message: what is refused, where, what to do."""
    if error.errno == errno.ENOENT and error.filename is None:
        return QrunError("the current folder does not exist any more", hint="change to another folder")
    reason, hint = _REASONS.get(error.errno or 0, (error.strerror or str(error), _PERMISSIONS))
    name = error.filename
    if isinstance(name, int) or name is None:  # a file descriptor says nothing to anybody
        return QrunError(f"the system refuses: {reason}", hint=hint)
    return QrunError(f"the system refuses a file or folder: {reason}", where=str(name), hint=hint)


def expanded(path: str | Path) -> Path:
    """A path with ``~`` and ``~name`` replaced by home folders.

    Raises:
        QrunError: nobody has this name here, or the user has no home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise QrunError(
            f"there is no home folder for {Path(path).parts[0]}",
            where=path,
            hint="write the path out in full; ./~name means a folder that is called so",
        ) from error
