"""The frame of a GGUF file: its metadata, and where each tensor lies. Nothing in it is trusted.

Every length is held against the bytes that are left before anything of that length is made, so that a
damaged or hostile file costs no more memory than it has bytes. The ``gguf`` package's own reader is not used
for this: it believes whatever lengths the file states.

Source: docs/gguf.md of ggml; versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from qconvert.errors import QconvertError

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_MOST_ENTRIES, _MOST_TENSORS, _MOST_DIMENSIONS = 1 << 16, 1 << 17, 4
_LONGEST_NAME, _LARGEST_ALIGNMENT = 1 << 12, 1 << 20
_STRING, _ARRAY = 8, 9
_SCALARS: dict[int, np.dtype[Any]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_AGAIN = "download the file again"
# Types of whole numbers hold no weights.
_NUMBERS = ("I8", "I16", "I32", "I64", "F64")
WEIGHT_TYPES = tuple(each.name for each in GGMLQuantizationType if each.name not in _NUMBERS)


@dataclass(frozen=True)
class StoredTensor:
    """One tensor: ``shape`` as PyTorch has it (rows first), ``start`` and ``size`` in bytes of the file."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class Container:
    """One file. Arrays of numbers are NumPy arrays, arrays of strings lists of ``bytes``."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]
    content: mmap.mmap = field(repr=False)

    def rows(self, name: str) -> NDArray[np.uint8]:
        """A tensor's bytes, uint8 ``[N, bytes of a row]``, mapped."""
        found = self.tensors[name]
        flat = np.frombuffer(self.content, np.uint8, found.size, found.start)
        return flat.reshape(math.prod(found.shape[:-1]), -1)

    def release(self, name: str) -> None:
        """A tensor's pages may leave memory; they are read again when they are needed."""
        found = self.tensors[name]
        first = -(-found.start // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (found.start + found.size) // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first and hasattr(mmap, "MADV_DONTNEED"):
            self.content.madvise(mmap.MADV_DONTNEED, first, last - first)


def open_container(path: Path) -> Container:
    """Read a file's frame, or take what was read of it before.

    Raises:
        QconvertError: it cannot be read, or is no whole GGUF file of a version that is known.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise QconvertError(f"the GGUF file cannot be read: {error.strerror}", where=path) from error
    return _open(path, (status.st_size, status.st_mtime_ns, status.st_ino))


@lru_cache(maxsize=64)
def _open(path: Path, stamp: tuple[int, ...]) -> Container:
    try:
        with path.open("rb") as file:
            if stamp[0] < len(_MAGIC) + 4:
                raise _broken(path, "it is no GGUF file: it is too short")
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise QconvertError(f"the GGUF file cannot be read: {error.strerror}", where=path) from error
    return _Reader(path, content).read()


class _Reader:
    """One pass over the frame; ``_place`` is where the next bytes are."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self._path, self._content, self._place = path, content, 0
        self._size = len(content)

    def read(self) -> Container:
        if self._take(4, "the first bytes") != _MAGIC:
            raise _broken(self._path, "it is no GGUF file")
        version = self._number("I", "the version")
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            what = "a big-endian file" if swapped in _VERSIONS else f"GGUF version {version}"
            hint = "convert the model with a current llama.cpp, on a machine like this one"
            raise _broken(self._path, f"{what} is not supported: versions 2 and 3, little-endian, are", hint)
        tensors = self._number("Q", "the number of tensors")
        entries = self._number("Q", "the number of entries")
        if tensors > _MOST_TENSORS or entries > _MOST_ENTRIES:
            raise _broken(self._path, f"it states {tensors:,} tensors and {entries:,} entries")
        metadata = self._entries(entries)
        infos = self._infos(tensors)
        return Container(
            self._path, metadata, self._placed(infos, _alignment(self._path, metadata)), self._content
        )

    def _entries(self, count: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(count):
            key = self._name("a key")
            if key in found:
                raise _broken(self._path, f"the key {key} stands twice in it")
            found[key] = self._value(self._number("I", f"the type of {key}"), key)
        return found

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._string(key)
        if kind == _ARRAY:
            return self._array(key)
        return self._scalars(kind, 1, key)[0].item()

    def _array(self, key: str) -> Any:
        kind, count = self._number("I", f"the type of {key}"), self._number("Q", f"the length of {key}")
        if kind != _STRING:
            return self._scalars(kind, count, key)
        if count > self._left // 8:  # each has at least its own length
            raise self._truncated(f"{count:,} strings of {key}")
        return [self._string(key) for _ in range(count)]

    def _scalars(self, kind: int, count: int, key: str) -> NDArray[Any]:
        dtype = _SCALARS.get(kind)
        if dtype is None:
            raise _broken(self._path, f"{key} has the unknown type {kind}")
        raw = self._take(count * dtype.itemsize, key)
        if dtype.kind == "b":
            return np.asarray(np.frombuffer(raw, np.uint8) != 0)
        return np.frombuffer(raw, dtype)

    def _infos(self, count: int) -> dict[str, tuple[GGMLQuantizationType, tuple[int, ...], int]]:
        found: dict[str, tuple[GGMLQuantizationType, tuple[int, ...], int]] = {}
        for _ in range(count):
            name = self._name("a tensor")
            if name in found:
                raise _broken(self._path, f"the tensor {name} stands twice in it")
            dimensions = self._number("I", f"the dimensions of {name}")
            if not 1 <= dimensions <= _MOST_DIMENSIONS:
                raise _broken(self._path, f"{name} has {dimensions} dimensions")
            shape = tuple(self._number("Q", f"the shape of {name}") for _ in range(dimensions))[::-1]
            kind, offset = self._number("I", f"the type of {name}"), self._number("Q", f"the place of {name}")
            try:
                found[name] = GGMLQuantizationType(kind), shape, offset
            except ValueError as error:
                raise _broken(self._path, f"{name} has the unknown type {kind}") from error
        return found

    def _placed(
        self, infos: dict[str, tuple[GGMLQuantizationType, tuple[int, ...], int]], alignment: int
    ) -> dict[str, StoredTensor]:
        start, found, end, before = -(-self._place // alignment) * alignment, {}, 0, ""
        for name, (kind, shape, offset) in sorted(infos.items(), key=lambda item: item[1][2]):
            block, block_bytes = GGML_QUANT_SIZES[kind]
            if not all(shape) or shape[-1] % block:
                raise _broken(
                    self._path, f"{name} has shape {list(shape)}, in blocks of {block} ({kind.name})"
                )
            size = math.prod(shape) // block * block_bytes
            if offset % alignment or offset < end:
                what = f"overlaps {before}" if offset < end else f"lies at {offset:,}, between two places"
                raise _broken(self._path, f"{name} {what}")
            if start + offset + size > self._size:
                what = f"{self._size:,} bytes on disk, {name} ends at {start + offset + size:,}"
                raise _broken(self._path, f"it is truncated: {what}")
            found[name], end, before = StoredTensor(kind, shape, start + offset, size), offset + size, name
        return {name: found[name] for name in infos}

    @property
    def _left(self) -> int:
        return self._size - self._place

    def _take(self, count: int, what: str) -> bytes:
        if count > self._left:
            raise self._truncated(what)
        self._place += count
        return self._content[self._place - count : self._place]

    def _number(self, kind: str, what: str) -> int:
        found: int = struct.unpack(f"<{kind}", self._take(struct.calcsize(f"<{kind}"), what))[0]
        return found

    def _string(self, what: str) -> bytes:
        return self._take(self._number("Q", f"the length of {what}"), what)

    def _name(self, what: str) -> str:
        raw = self._string(what)
        if not 0 < len(raw) <= _LONGEST_NAME:
            raise _broken(self._path, f"the name of {what} has {len(raw):,} bytes")
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _broken(self._path, f"the name of {what} is no text") from error

    def _truncated(self, what: str) -> QconvertError:
        place = f"{self._left:,} bytes are left at {self._place:,}"
        return _broken(self._path, f"it is truncated: {place}, too few for {what[:100]}")


def _alignment(path: Path, metadata: dict[str, Any]) -> int:
    found = metadata.get("general.alignment", 32)
    good = type(found) is int and 8 <= found <= _LARGEST_ALIGNMENT and found & (found - 1) == 0
    if not good:
        raise _broken(path, f"general.alignment = {found!r:.40} is no power of two that places can have")
    return int(found)


def _broken(path: Path, what: str, hint: str = _AGAIN) -> QconvertError:
    return QconvertError(f"{path.name} is unusable: {what}.", where=path, hint=hint)
