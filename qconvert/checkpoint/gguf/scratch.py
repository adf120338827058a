"""Temporary folders of GGUF files, and those that a killed process has left.

A process has one folder, which holds those of its files. It keeps the folder locked as long as it lives,
and the system drops the lock when it dies, in whatever way: what is unlocked and ours is left over.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from qconvert.checkpoint.gguf.marker import MARKER, PREFIX
from qrun.text.chat_template import ADDITIONAL_TEMPLATES

OWNED = "made-by-qconvert"  # in a process's folder once it is locked
_FILES = {
    *(MARKER, "config.json", "tokenizer.json", "tokenizer_config.json"),
    *("generation_config.json", "chat_template.jinja"),
}
_mine: dict[int, Path] = {}  # by process id: a forked one has a folder of its own


def new_folder() -> Path:
    """An empty folder, whose name begins with ``PREFIX``, that goes when this process ends."""
    root = _mine.get(os.getpid())
    if root is None or not root.is_dir():
        remove_leftovers()
        root = _mine[os.getpid()] = _own_folder()
    return Path(tempfile.mkdtemp(prefix=PREFIX, dir=root))


def remove_leftovers() -> None:
    """Remove what processes that are dead have left; nothing that is alive, another's, or holds more."""
    for root in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            if root.is_symlink() or root.stat().st_uid != os.geteuid() or not (root / OWNED).is_file():
                continue
            descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if all(_is_ours(entry) for entry in root.iterdir()):
                shutil.rmtree(root, ignore_errors=True)
        except OSError:  # it is alive, or the file system has no locks
            continue
        finally:
            os.close(descriptor)


def _own_folder() -> Path:
    root = Path(tempfile.mkdtemp(prefix=PREFIX))
    # Never closed: it is the lock.
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (root / OWNED).touch()
    except OSError:
        os.close(descriptor)  # without locks nobody could tell whether it is left over
    atexit.register(_remove, root, os.getpid())
    return root


def _remove(root: Path, maker: int) -> None:
    if os.getpid() == maker:
        shutil.rmtree(root, ignore_errors=True)


def _is_ours(entry: Path) -> bool:
    """Whether something in a process's folder is as ``folder.unpack`` makes it, and nothing else."""
    if entry.name == OWNED:
        return True
    if not entry.name.startswith(PREFIX) or entry.is_symlink() or not entry.is_dir():
        return False
    return all(
        each.is_symlink() or each.name in _FILES or _are_templates(each)
        for folder in entry.iterdir()
        for each in folder.iterdir()
    )


def _are_templates(folder: Path) -> bool:
    return folder.name == ADDITIONAL_TEMPLATES and all(each.suffix == ".jinja" for each in folder.iterdir())
