"""How the temporary folder of a GGUF file is known (``folder.py`` makes it)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qconvert.errors import QconvertError

MARKER, PREFIX = "gguf.json", "qconvert-gguf-"
MAGIC, ENDING = b"GGUF", ".gguf"


def is_gguf(path: Path) -> bool:
    """Whether a source is a GGUF file; Ollama's have no ending, so the first bytes count too."""
    if path.suffix.lower() == ENDING and not path.is_dir():
        return True
    if not path.is_file():  # a pipe would be waited for
        return False
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def parts_of(folder: Path) -> list[Path] | None:
    """The files behind a folder that ``unpack`` has made; None for any other folder."""
    if not (folder / MARKER).is_file() or not folder.parent.name.startswith(PREFIX):
        return None
    told = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    return [folder / name for name in told["parts"]]


@contextmanager
def told_of_the_file(folder: Path) -> Iterator[None]:
    """Errors about a file of such a folder name the GGUF file, which is what the user has."""
    try:
        yield
    except QconvertError as error:
        if error.where is not None and parts_of(folder) is not None and str(folder) in str(error.where):
            source = json.loads((folder / MARKER).read_text(encoding="utf-8"))["source"]
            raise QconvertError(
                error.what.replace(str(folder), source), where=source, hint=error.hint
            ) from error
        raise
