"""Which files of a folder are ours: the ones that its marker lists. Nothing else is ever deleted.

The marker of an export is its manifest, that of the sample checkpoint ``sample-model.json``. A marker that
does not say what we write into it is somebody else's file of that name.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from qrun.folder.manifest import FORMAT_NAME, MANIFEST_NAME


@dataclass(frozen=True)
class Marker:
    """The file by which a folder of ours is known.

    ``listed`` reads its content: the other files that we wrote (POSIX paths relative to the folder), or None
    where the file is not ours.
    """

    name: str
    listed: Callable[[Mapping[str, Any]], Iterable[str] | None]


def _listed_by_manifest(manifest: Mapping[str, Any]) -> Iterable[str] | None:
    entries = manifest.get("files")
    if manifest.get("format") != FORMAT_NAME or not isinstance(entries, list):
        return None
    return [str(entry.get("path")) for entry in entries if isinstance(entry, dict)]


MANIFEST = Marker(MANIFEST_NAME, _listed_by_manifest)


def our_files(folder: Path, marker: Marker) -> set[str] | None:
    """The files that we wrote into ``folder``, marker included; None where the folder is not ours."""
    try:
        content = json.loads((folder / marker.name).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    listed = marker.listed(content) if isinstance(content, dict) else None
    if listed is None:
        return None
    paths = {PurePosixPath(name) for name in listed}  # one that leads out of the folder is none of ours
    return {marker.name, *(str(path) for path in paths if not path.is_absolute() and ".." not in path.parts)}


def foreign_files(folder: Path, ours: Iterable[str]) -> list[str]:
    """What stands in ``folder`` and is not among ``ours``: files, links, folders without a file of ours.

    Raises:
        OSError: the folder cannot be listed.
    """
    names = {Path(name) for name in ours}
    parents = {parent for name in names for parent in name.parents}
    found = []

    def fail(error: OSError) -> None:
        raise error

    for top, folders, files in os.walk(folder, onerror=fail):
        here = Path(top).relative_to(folder)
        for name in list(folders):
            path = here / name
            if path in parents and not (folder / path).is_symlink():
                continue
            folders.remove(name)
            if path not in names:
                found.append(f"{path.as_posix()}/")
        found += [(here / name).as_posix() for name in files if here / name not in names]
    return sorted(found)


def remove_files(folder: Path, ours: Iterable[str]) -> None:
    """Delete the named files, then the folders that this has emptied; whatever else is there stays."""
    names = [Path(name) for name in ours]
    for name in names:
        with contextlib.suppress(OSError):
            (folder / name).unlink()
    for parent in sorted({parent for name in names for parent in name.parents}, reverse=True):
        with contextlib.suppress(OSError):
            (folder / parent).rmdir()
