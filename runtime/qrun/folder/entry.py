"""One file of a model folder, compared with what the manifest says of it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from qrun.errors import QrunError

Progress = Callable[[str, int], None]

_COPY_AGAIN = "copy the folder again as a whole, or export it again with `qconvert export`"
# Text that people may edit: defaults, templates, what other programs read. Graph, weights and vocabulary
# decide what the model computes, and must be as they were verified.
_EDITABLE = frozenset(
    {
        "config.json",
        "generation_config.json",
        "genai_config.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "LICENSE",
    }
)


@dataclass(frozen=True)
class FileEntry:
    """One file of the folder: POSIX path relative to it, size in bytes, SHA-256 in hex."""

    path: str
    size: int
    sha256: str

    @property
    def editable(self) -> bool:
        """Whether people may edit this file: a changed content is noted and not refused."""
        return PurePosixPath(self.path).name in _EDITABLE or self.path.endswith(".jinja")

    def check(self, folder: Path, *, hashes: bool = False, progress: Progress | None = None) -> bool:
        """Compare the file with this entry: its size always, its SHA-256 where asked or where it is editable.

        Returns:
            Whether the file is unchanged; False only for an editable one that was edited.

        Raises:
            QrunError: it is missing, closed to this user, truncated or altered.
        """
        path = folder / self.path
        if not path.is_file():
            raise QrunError(f"{self.path} {_why_no_file(path)}", where=path, hint=_COPY_AGAIN)
        if not os.access(path, os.R_OK):
            # ONNX Runtime's own words would be "SystemError : 13".
            raise QrunError(
                f"{self.path} may not be read",
                where=path,
                hint="check the permissions of the file and of the folders above it",
            )
        size = path.stat().st_size
        if self.editable:
            return size == self.size and sha256_of(path, progress) == self.sha256
        if size != self.size:
            state = "truncated" if size < self.size else "altered"
            what = f"{self.path} is {state}: {size:,} bytes, the manifest says {self.size:,}"
            raise QrunError(what, where=path, hint=_COPY_AGAIN)
        if hashes and sha256_of(path, progress) != self.sha256:
            what = f"{self.path} is altered: its SHA-256 is not the manifest's"
            raise QrunError(what, where=path, hint=_COPY_AGAIN)
        return True


def sha256_of(path: Path, progress: Progress | None = None) -> str:
    """SHA-256 of a file in hex, read in pieces of 4 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            if progress is not None:
                progress(path.name, len(chunk))
    return digest.hexdigest()


def _why_no_file(path: Path) -> str:
    if path.exists():
        return "is not a regular file"
    if path.is_symlink():
        return f"is a link to {path.readlink()}, and nothing is there"
    return "is missing from the model folder"
