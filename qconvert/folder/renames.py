"""Renames that cannot lose anything, whatever appears under the new name meanwhile."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

_AT_FDCWD = -100
_NOREPLACE = 1
_EXCHANGE = 2


def rename_new(folder: Path, name: Path) -> None:
    """Give ``folder`` a name that nothing has.

    Raises:
        FileExistsError: something has it, be it an empty folder or a link that leads nowhere.
        OSError: the file system's own refusal.
    """
    if _renameat2(folder, name, _NOREPLACE):
        return
    # Without that call: reserve the name with an empty folder, since a rename replaces only empty folders.
    name.mkdir()
    try:
        folder.rename(name)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(name)) from error
        name.rmdir()
        raise


def exchange(first: Path, second: Path) -> None:
    """Swap the names of two folders: in one step, or in three renames where the system has no such call.

    Raises:
        OSError: the file system's own refusal; both have their old names.
    """
    if _renameat2(first, second, _EXCHANGE):
        return
    aside = first.with_name(f"{first.name}.old")
    rename_new(second, aside)
    try:
        rename_new(first, second)
    except OSError:
        rename_new(aside, second)
        raise
    rename_new(aside, first)


def _renameat2(old: Path, new: Path, flag: int) -> bool:
    """Whether the system could do it (Linux, on most file systems).

    Raises:
        OSError: the system has the call, and it failed.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    if libc.renameat2(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), flag) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):  # this file system, or an old kernel
        return False
    raise OSError(number, os.strerror(number), str(new))
