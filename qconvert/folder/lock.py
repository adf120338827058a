"""Locks of the system's, so that two of our programs never write to one place at once.

The system drops a lock when its holder ends in whatever way, so a killed program blocks nobody. Where the
file system has no locks, two programs at once are not noticed.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qconvert.errors import QconvertError

# EBADF: a network's file system wants a file that is open for writing, which a folder never is.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)


def lock_file(path: Path, busy: QconvertError) -> tuple[int, bool]:
    """Open a file, which is made if it is not there, and lock it.

    Args:
        path: the file.
        busy: what is raised where another process holds the lock.

    Returns:
        The descriptor, which holds the lock until it is closed; and whether there is a lock at all.

    Raises:
        OSError: the file cannot be made.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            exclusive = _lock(descriptor, busy)
            # Its last holder may have removed or replaced the file after we opened it.
            valid = not exclusive or _is_at(descriptor, path)
        except BaseException:
            os.close(descriptor)
            raise
        if valid:
            return descriptor, exclusive
        os.close(descriptor)


@contextmanager
def only_changer(folder: Path) -> Iterator[None]:
    """Hold the lock of whoever changes files of a finished model folder; it is on the folder itself.

    Raises:
        QconvertError: another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _lock(
            descriptor,
            QconvertError(
                f"another qconvert is changing {folder}",
                where=folder,
                hint="wait until it has ended, and start again",
            ),
        )
        yield
    finally:
        os.close(descriptor)


@contextmanager
def only_user(file: Path | None) -> Iterator[None]:
    """Hold the lock of a file that is read at the beginning and written at the end; None is no file.

    Raises:
        QconvertError: another process holds it.
        OSError: the file cannot be made.
    """
    if file is None:
        yield
        return
    file = Path(os.path.realpath(file))  # Path.resolve raises a RuntimeError for links in a circle
    busy = QconvertError(
        f"another qconvert is using {file}",
        where=file,
        hint="wait until it has ended, or name another file",
    )
    descriptor, exclusive = lock_file(file, busy)
    try:
        yield
    finally:
        if exclusive and _is_at(descriptor, file) and os.fstat(descriptor).st_size == 0:
            file.unlink(missing_ok=True)  # made for the lock, and nothing was written
        os.close(descriptor)


def _lock(descriptor: int, busy: QconvertError) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        raise busy from error
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except OSError:
        return False
