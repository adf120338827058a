"""The model folder: written under another name, completed, then given its name by one rename.

An export that fails, is interrupted or is killed leaves no folder of the wanted name, or the older
folder of that name as it was. What a killed export left under its temporary name is removed by the
next one to the same place.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qconvert.errors import QconvertError
from qrun.folder.manifest import FORMAT_NAME, FORMAT_VERSION, MANIFEST_NAME, sha256_of

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class ModelFolder:
    """A model folder in the making: write into ``path``, then ``publish``."""

    def __init__(self, output: Path, path: Path) -> None:
        self.output = output
        self.path = path
        self._hashes: dict[tuple[str, int, int], str] = {}

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        text = json.dumps(value, indent=2, ensure_ascii=False)
        (self.path / name).write_text(text + "\n", encoding="utf-8")

    def write_manifest(self, facts: Mapping[str, Any]) -> None:
        """Write ``qconvert.json``: the given facts, then size and SHA-256 of every other file."""
        files = sorted(p for p in self.path.rglob("*") if p.is_file() and p.name != MANIFEST_NAME)
        entries = [
            {"path": p.relative_to(self.path).as_posix(), "size": p.stat().st_size, "sha256": self._hash(p)}
            for p in files
        ]
        header = {"format": FORMAT_NAME, "format_version": FORMAT_VERSION}
        self.write_json(MANIFEST_NAME, {**header, **facts, "files": entries})

    def _hash(self, path: Path) -> str:
        """SHA-256 of a file, computed once for the same content (the manifest is written twice)."""
        status = path.stat()
        key = (path.name, status.st_size, status.st_mtime_ns)
        if key not in self._hashes:
            self._hashes[key] = sha256_of(path)
        return self._hashes[key]

    def publish(self, name: Path | None = None) -> Path:
        """Rename the folder to its output name (or to ``name``), replacing what stands there in one step."""
        target = name or self.output
        _sync(self.path)
        if target.exists():
            _exchange(self.path, target)  # the old folder now has the temporary name, and goes with it
        else:
            self.path.rename(target)
        return target


@contextmanager
def new_model_folder(
    output: Path, *, force: bool, needed_bytes: int, marker: str = MANIFEST_NAME
) -> Iterator[ModelFolder]:
    """A temporary folder beside ``output``, removed on the way out if it was not published.

    Args:
        output: the folder's final name.
        force: replace a folder of that name.
        needed_bytes: what will be written; checked against the free space first.
        marker: the file by which a folder of ours is known, so that ``force`` deletes nothing else.

    Raises:
        QconvertError: the output exists, cannot be written, or would not fit on the disk.
    """
    output = output.expanduser().resolve()  # a link to a folder stays, and its target is replaced
    _check_output(output, force, marker)
    created = [folder for folder in output.parents if not folder.exists()]
    published = False
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(output)
        _check_space(output.parent, needed_bytes)
        path = Path(tempfile.mkdtemp(prefix=_prefix(output), dir=output.parent))
        try:
            path.chmod(0o755)  # mkdtemp makes a private folder; a model folder is an ordinary one
            with _locked(path):
                yield ModelFolder(output, path)
            published = True
        finally:
            _remove(path)
    except OSError as error:
        what = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what, hint = "no space left on the disk", "free some space, or choose another output folder"
        else:
            what, hint = f"cannot write the folder: {what}", "choose another output folder"
        raise QconvertError(what, where=error.filename or output.parent, hint=hint) from error
    finally:
        for folder in created if not published else ():
            with contextlib.suppress(OSError):
                folder.rmdir()


def _check_output(output: Path, force: bool, marker: str) -> None:
    if not output.exists():
        return
    if not output.is_dir():
        raise QconvertError(
            f"{output} exists and is not a folder", where=output, hint="choose another output folder"
        )
    if not force:
        raise QconvertError(
            f"{output} exists already",
            where=output,
            hint="replace it with --force, or choose another output folder",
        )
    if any(output.iterdir()) and not (output / marker).is_file():
        raise QconvertError(
            f"{output} holds something that qconvert did not make, and --force would delete it",
            where=output,
            hint="choose another output folder, or remove this one yourself",
        )


def _check_space(parent: Path, needed: int) -> None:
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise QconvertError(
            f"{needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free",
            where=parent,
            hint="free some space, or choose another output folder",
        )


def _prefix(output: Path) -> str:
    return f".{output.name}.tmp-"


def _remove_stale(output: Path) -> None:
    """Remove temporary folders of exports to ``output`` that are no longer running."""
    for path in output.parent.glob(f"{_prefix(output)}*"):
        try:
            with _locked(path):
                shutil.rmtree(path, ignore_errors=True)
        except OSError:
            continue  # another export is writing it


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder, which the system drops when this process ends in whatever way.

    Raises:
        OSError: another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _exchange(path: Path, target: Path) -> None:
    """Swap two folders in one atomic step (renameat2); two renames where the system has no such call."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        names = (os.fsencode(path), os.fsencode(target))
        if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
            return
    aside = path.with_name(f"{path.name}.old")
    target.rename(aside)
    path.rename(target)
    aside.rename(path)


def _remove(folder: Path) -> None:
    """Remove a folder. Ctrl-C in the middle of it ends the program once the rest is gone as well."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except KeyboardInterrupt:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _sync(folder: Path) -> None:
    """Hand the files to the disk before the name appears, so that a power cut cannot tear the folder."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
