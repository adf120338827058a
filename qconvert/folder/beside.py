"""Hidden names beside an output: the lock of whoever writes it, and the folder that is not finished yet.

A name alone proves nothing: a user may have a folder called ``.model.tmp-1``. What a killed export has left
is therefore written down in its lock file before it is made, and only that is ever removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qconvert.errors import QconvertError
from qconvert.folder.lock import lock_file

_LONGEST_NAME = 255  # bytes, on every file system in common use
_RECORD_KEY = "unfinished qconvert folder"


def hidden_name(output: Path, suffix: str) -> str:
    """``.NAME.SUFFIX``, with a digest in place of the end of a name that is too long for it."""
    name, room = os.fsencode(output.name), _LONGEST_NAME - len(suffix) - 2
    if len(name) > room:
        digest = hashlib.sha256(name).hexdigest()[:16]
        # Cut between characters, since half a character is not valid text.
        kept = name[: room - 1 - len(digest)].decode("utf-8", "ignore")
        name = os.fsencode(f"{kept}-{digest}")
    return f".{os.fsdecode(name)}.{suffix}"


def stores_beside(output: Path, kind: str) -> list[Path]:
    """Folders ``.NAME.KIND-`` with 16 hexadecimal digits beside ``output``.

    Not found by ``glob``, for which ``model[v2]`` is a pattern.
    """
    template = re.escape(hidden_name(output, f"{kind}-{'0' * 16}").removesuffix("0" * 16))
    return sorted(
        Path(entry.path)
        for entry in os.scandir(output.parent)
        if re.fullmatch(f"{template}[0-9a-f]{{16}}", entry.name) and entry.is_dir(follow_symlinks=False)
    )


class Writer:
    """Whoever may write to an output now; see ``only_writer``."""

    def __init__(self, output: Path, descriptor: int, *, exclusive: bool) -> None:
        self._output = output
        self._descriptor = descriptor
        # An empty file is ours, and so is one with our record; any other content is not ours to overwrite.
        self._recording = exclusive and (os.fstat(descriptor).st_size == 0 or self._recorded() is not None)

    def new_folder(self) -> Path:
        """An empty folder beside the output, that the next writer removes if this process is killed."""
        self._remove_leftover()
        while True:
            name = hidden_name(self._output, f"tmp-{secrets.token_hex(8)}")
            path = self._output.with_name(name)
            if self._recording:
                self._write(json.dumps({_RECORD_KEY: name}))
            try:
                path.mkdir()
            except FileExistsError:
                continue
            return path

    def _remove_leftover(self) -> None:
        name = self._recorded() if self._recording else None
        path = None if name is None else self._output.with_name(name)
        if path is not None and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)

    def _recorded(self) -> str | None:
        try:
            record = json.loads(os.pread(self._descriptor, 4096, 0))
        except ValueError:
            return None
        name = record.get(_RECORD_KEY) if isinstance(record, dict) else None
        prefix = hidden_name(self._output, f"tmp-{'0' * 16}").removesuffix("0" * 16)
        if isinstance(name, str) and re.fullmatch(f"{re.escape(prefix)}[0-9a-f]{{16}}", name):
            return name
        return None

    def _write(self, record: str) -> None:
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, record.encode(), 0)

    def release(self, path: Path) -> None:
        """Remove the lock file ``path``, unless it is not ours, and unlock."""
        if self._recording:
            with contextlib.suppress(OSError):
                path.unlink()
        os.close(self._descriptor)


@contextmanager
def only_writer(output: Path) -> Iterator[Writer]:
    """Hold the lock of whoever writes to ``output``.

    The lock (see ``lock``) is on a file beside the output.

    Raises:
        QconvertError: another process holds it.
        OSError: the file cannot be made.
    """
    path = output.with_name(hidden_name(output, "qconvert-lock"))
    busy = QconvertError(
        f"another export is writing to {output}",
        where=output,
        hint="wait until it has ended, or choose another output folder",
    )
    descriptor, exclusive = lock_file(path, busy)
    writer = Writer(output, descriptor, exclusive=exclusive)
    try:
        yield writer
    finally:
        writer.release(path)
