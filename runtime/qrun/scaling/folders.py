"""The model folder on every node: the one that lies there if it is the same, else a copy of ours."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qrun import __version__
from qrun.batch.job import digest
from qrun.errors import QrunError
from qrun.folder.manifest import MANIFEST_NAME, read_manifest
from qrun.text.chat_template import ADDITIONAL_TEMPLATES

_PIECE = 64 << 20  # bytes of a file that travel at once
_NAME = "qrun-model-"
# What a model is opened with, also where it was put beside the files of its manifest.
_TEXTS = (
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    f"{ADDITIONAL_TEMPLATES}/*.jinja",
)


@dataclass(frozen=True)
class Folder:
    """The model folder that all workers must have.

    Attributes:
        path: where it lies on the machine that starts the job, and where nodes look first. One that begins
            with ~ is looked for in each node's own home.
        files: SHA-256 of every file, by its path within the folder.
    """

    path: str
    files: Mapping[str, str]

    @property
    def digest(self) -> str:
        """64 hexadecimal digits: the same for the same files."""
        return hashlib.sha256(json.dumps(self.files, sort_keys=True).encode()).hexdigest()


def folder_of(path: Path) -> Folder:
    """What the nodes must have.

    Raises:
        QrunError: this is no model folder, or not a whole one.
    """
    manifest = read_manifest(path)
    manifest.check_files()
    names = sorted({MANIFEST_NAME, *(entry.path for entry in manifest.files), *_texts(manifest.folder)})
    files = {name: digest(manifest.folder / name) for name in names if (manifest.folder / name).is_file()}
    shown = str(path) if str(path).startswith("~") else str(manifest.folder.resolve())
    return Folder(shown, files)


def _texts(place: Path) -> set[str]:
    return {str(path.relative_to(place)) for each in _TEXTS for path in place.glob(each) if path.is_file()}


class Shelf:
    """Gives pieces of the folder's files to nodes that have none; an actor beside the folder."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._path = Path(folder.path).expanduser()

    def read(self, name: str, start: int) -> bytes:
        """Up to 64 MiB of a file, from a place on; nothing at its end."""
        assert name in self._folder.files, "only files of the folder"
        with (self._path / name).open("rb") as file:
            file.seek(start)
            return file.read(_PIECE)


def ready(folder: Folder, shelf: Any) -> tuple[Path, bool]:
    """The folder on this node, and whether it is a copy that was made for this job or an earlier one.

    Args:
        folder: what it must be.
        shelf: the actor that has the files; None where nothing is copied.

    Raises:
        QrunError: another folder lies under its path, none does and there is no shelf, or no room for a copy.
    """
    own = Path(folder.path).expanduser()
    if own.exists():
        _check(own, folder, shelf)
        return own, False
    if shelf is None:
        raise QrunError(
            f"{_here()} has no model folder", where=own, hint="copy the folder to this path of every node"
        )
    place = Path(tempfile.gettempdir()) / f"{_NAME}{folder.digest[:16]}"
    # One worker of a node copies, the others wait for it.
    with place.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():
            _copy(place, folder, shelf)
    _check(place, folder, shelf)
    return place, True


def _copy(place: Path, folder: Folder, shelf: Any) -> None:
    import ray

    part = Path(tempfile.mkdtemp(prefix=f"{place.name}.", dir=place.parent))
    try:
        for name in folder.files:
            target = part / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as file:
                while piece := ray.get(shelf.read.remote(name, file.tell())):
                    file.write(piece)
        _check(part, folder, shelf)
        part.replace(place)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _check(place: Path, folder: Folder, shelf: Any) -> None:
    or_copied = "" if shelf is None else ", or remove it there: then it is copied"
    for name in sorted({*folder.files, *_texts(place)}):
        path, wanted = place / name, folder.files.get(name)
        found = digest(path) if path.is_file() else None
        if found != wanted:
            what = f"{name} is another file than" if found else f"{name} is missing, and is not in"
            if wanted is None:
                what = f"{name} is there, and is not in"
            raise QrunError(
                f"{_here()} has another model folder: {what} that of the machine that starts the job",
                where=path,
                hint=f"copy the folder to all nodes again{or_copied}",
            )


def checked(folder: Folder | None, shelf: Any) -> dict[str, Any]:
    """What a node says of itself: its address, the version of qrun, and how it has the folder, if it must.

    Raises:
        QrunError: see ``ready``.
    """
    copied = folder is not None and ready(folder, shelf)[1]
    return {"address": _here(), "version": __version__, "copied": copied}


def _here() -> str:
    """The node's address, and the beginning of its id, as `ray list nodes` shows both."""
    import ray

    return f"node {ray.util.get_node_ip_address()} ({ray.get_runtime_context().get_node_id()[:8]})"
