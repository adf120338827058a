"""The model folder: written under another name, completed, then given its name by one rename.

An export that fails, is interrupted or is killed leaves no folder of the wanted name, or the older
folder of that name as it was. What a killed export left under its temporary name is removed by the
next one to the same place. Nothing is ever deleted that we did not write.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qconvert.errors import QconvertError
from qconvert.folder.beside import hidden_name, only_writer
from qconvert.folder.lock import only_changer
from qconvert.folder.ours import MANIFEST, Marker, foreign_files, our_files, remove_files
from qconvert.folder.renames import exchange, rename_new
from qrun.folder.entry import sha256_of
from qrun.folder.manifest import FORMAT_NAME, FORMAT_VERSION, MANIFEST_NAME
from qrun.folder.paths import user_path


class ModelFolder:
    """A model folder in the making: write into ``path``, then ``publish``.

    Attributes:
        output: the absolute name that it will get.
        path: where it is written.
        published: the name that it got, None until then.
    """

    def __init__(self, output: Path, path: Path, *, force: bool = False, marker: Marker = MANIFEST) -> None:
        self.output = output
        self.path = path
        self.published: Path | None = None
        self._force = force
        self._marker = marker
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

    def note_hash(self, path: Path, sha256: str) -> None:
        """What is in a file that is complete, for the manifest: whoever wrote it has hashed it."""
        self._hashes[_state(path)] = sha256

    def _hash(self, path: Path) -> str:
        """SHA-256 of a file, computed once for the same content (the manifest is written twice)."""
        key = _state(path)
        if key not in self._hashes:
            self._hashes[key] = sha256_of(path)
        return self._hashes[key]

    def publish(self) -> Path:
        """Give the folder its output name in one step.

        Raises:
            QconvertError: something stands there by now that may not be replaced; it is left as it is.
            OSError: the disk's own refusal.
        """
        _sync(self.path)
        if self._force and os.path.lexists(self.output):
            self._replace()
        else:
            try:
                rename_new(self.path, self.output)
            except FileExistsError as error:
                raise QconvertError(
                    f"{self.output} appeared while this was running, and is left as it is",
                    where=self.output,
                    hint="move it away and start again, or choose another output folder",
                ) from error
        self.published = self.output
        return self.output

    def put_aside(self) -> Path:
        """Give the folder the first free name of OUTPUT.failed, OUTPUT.failed-2, ..., replacing nothing."""
        _sync(self.path)
        for number in itertools.count(1):
            name = hidden_name(self.output, "failed" if number == 1 else f"failed-{number}").removeprefix(".")
            try:
                rename_new(self.path, self.output.with_name(name))
            except FileExistsError:
                continue
            self.published = self.output.with_name(name)
            return self.published
        raise AssertionError("there is always another number")

    def _replace(self) -> None:
        """Swap with the folder of ours that has the name, and delete what we had written there.

        It is looked at again after the swap, when nobody finds it by its name any more.
        """
        with only_changer(self.output):  # refused while a plan is built in it, or a report is written
            self._swap()

    def _swap(self) -> None:
        check_replaceable(self.output, self._marker)
        self.published = self.output  # from here on the temporary name may be that of the older folder
        try:
            exchange(self.path, self.output)
        except BaseException:
            self.published = None
            raise
        try:
            ours = check_replaceable(self.path, self._marker, told_as=self.output)
        except BaseException:  # nothing is deleted yet, so both get their names back, after Ctrl-C too
            exchange(self.path, self.output)
            self.published = None
            raise
        try:
            remove_files(self.path, ours)
        except (KeyboardInterrupt, SystemExit):  # of Ctrl-C and SIGTERM: nobody could find what is left
            remove_files(self.path, ours)
            raise


def _state(path: Path) -> tuple[str, int, int]:
    """What changes with a file's content."""
    status = path.stat()
    return path.name, status.st_size, status.st_mtime_ns


@contextmanager
def new_model_folder(
    output: Path, *, force: bool, needed_bytes: int, marker: Marker = MANIFEST
) -> Iterator[ModelFolder]:
    """A temporary folder beside ``output``, removed on the way out if it was not published.

    Args:
        output: the folder's final name.
        force: replace a folder of ours that has this name.
        needed_bytes: what will be written; checked against the free space first.
        marker: the file by which a folder of ours is known, so that ``force`` deletes nothing else.

    Raises:
        QconvertError: the output exists, cannot be written, is being written by another process, or would
            not fit on the disk.
    """
    output = resolved(output)  # a link to a folder stays, and its target is replaced
    _check_output(output, force, marker)
    created = [folder for folder in output.parents if not folder.exists()]
    folder: ModelFolder | None = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _check_space(output.parent, needed_bytes)
        with only_writer(output) as writer:
            folder = ModelFolder(output, writer.new_folder(), force=force, marker=marker)
            try:
                yield folder
            finally:
                if folder.published is None:
                    _remove(folder.path)
    except OSError as error:
        if not _is_about(error, output.parent):
            raise
        what = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what, hint = "no space left on the disk", "free some space, or choose another output folder"
        else:
            what, hint = f"cannot write the folder: {what}", "choose another output folder"
        raise QconvertError(what, where=error.filename or output.parent, hint=hint) from error
    finally:
        for parent in created if folder is None or folder.published is None else ():
            with contextlib.suppress(OSError):
                parent.rmdir()


def resolved(output: Path) -> Path:
    """The absolute path that an output's name means, links followed.

    Raises:
        QconvertError: it is no name of a folder, or there is no such home folder.
    """
    path = Path(os.path.realpath(user_path(output)))
    if not path.name:
        raise QconvertError(
            f"{output} is no name for a model folder", hint="choose a folder that does not exist yet"
        )
    return path


def check_replaceable(output: Path, marker: Marker, *, told_as: Path | None = None) -> set[str]:
    """The files of a folder that holds nothing but what we wrote: those that a replacement deletes.

    Raises:
        QconvertError: names what is not ours.
        OSError: it cannot be listed.
    """
    name = told_as or output
    if output.is_symlink() or not output.is_dir():
        raise QconvertError(
            f"{name} exists and is not a folder", where=name, hint="choose another output folder"
        )
    ours = our_files(output, marker)
    if ours is None and any(output.iterdir()):
        raise QconvertError(
            f"{name} holds something that qconvert did not make, and --force would delete it",
            where=name,
            hint="choose another output folder, or remove this one yourself",
        )
    ours = ours or set()
    if foreign := foreign_files(output, ours):
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise QconvertError(
            f"{name} holds {foreign[0]}{more}, which qconvert did not make, and --force would delete it",
            where=name / foreign[0],
            hint="move it elsewhere, or choose another output folder",
        )
    return ours


def _check_output(output: Path, force: bool, marker: Marker) -> None:
    if not os.path.lexists(output):
        return
    if force or not output.is_dir():
        check_replaceable(output, marker)
        if not os.access(output, os.W_OK):  # what is in it would stay, under a hidden name
            raise QconvertError(
                f"{output} is read-only, and --force would delete what is in it",
                where=output,
                hint="make it writable, or choose another output folder",
            )
        with only_changer(output):
            pass
    else:
        raise QconvertError(
            f"{output} exists already",
            where=output,
            hint="replace it with --force, or choose another output folder",
        )


def _is_about(error: OSError, folder: Path) -> bool:
    """Whether an error comes from writing into ``folder``, and not from reading something elsewhere."""
    name = error.filename
    return not isinstance(name, str) or Path(name).is_relative_to(folder)


def _check_space(parent: Path, needed: int) -> None:
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise QconvertError(
            f"{needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free",
            where=parent,
            hint="free some space, or choose another output folder",
        )


def _remove(folder: Path) -> None:
    """Remove a folder. Ctrl-C or SIGTERM meanwhile ends the program once the rest is gone as well."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except (KeyboardInterrupt, SystemExit):
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
