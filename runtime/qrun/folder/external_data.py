"""Which files a graph takes its weights from, read without onnx or protobuf.

A graph may name any path for its weights, and ONNX Runtime before 1.24 opens whatever it names. So
every name is compared with the manifest before the graph is opened. Only the fields that lead to such
names are followed; the rest, embedded weights included, is skipped by its length.

A file of the folder may be a link, as in a hub's cache, or to another disk: that is the choice of whoever
made the link. ONNX Runtime from 1.24 on refuses weights that a link keeps in another folder than the graph's,
so it is then given the graph with the true places in it (``with_true_places``).

Source: onnx/onnx.proto3, and the wire format in protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from qrun.errors import QrunError
from qrun.folder.manifest import Manifest

# ONNX Runtime's option that names the folder of the data files of a graph that is given as bytes.
DATA_FOLDER = "session.model_external_initializers_file_folder_path"
_VARINT, _BYTES = 0, 2
_FIXED_LENGTHS = {1: 8, 5: 4}

# For each message, by field number, the kind of message in that field. "location" is what is looked for.
_FIELDS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "location"},
}
_DEEPEST = 100  # protobuf's own limit to nesting


class _MalformedError(Exception):
    """The bytes are not an ONNX model."""


def check_external_data(manifest: Manifest) -> None:
    """Refuse a folder with a graph that reads weights from anything but files of its own folder.

    Raises:
        QrunError: a file outside the folder or not in the manifest, or bytes that are not a graph.
    """
    for graph in (manifest.graph_path, manifest.prefill_path):
        if graph is not None:
            _check_graph(graph, manifest)


def _check_graph(graph: Path, manifest: Manifest) -> None:
    ours = {manifest.folder / entry.path for entry in manifest.files}
    try:
        locations = external_locations(graph)
    except (_MalformedError, OSError, ValueError) as error:
        raise QrunError(
            f"{graph.name} is not an ONNX graph: {error}",
            where=graph,
            hint="copy the folder again as a whole, or export it again with `qconvert export`",
        ) from error
    for location in sorted(locations):
        # Comparing names is enough, since the manifest holds none that leads out of the folder.
        if graph.parent / PurePosixPath(location) not in ours:
            raise QrunError(
                f"the graph wants to read {location!r}, which is not one of the model folder's files",
                where=graph,
                hint="do not use this folder: it was not written by qconvert, or was changed since",
            )


def external_locations(path: Path) -> set[str]:
    """Every location of external data that an ONNX file names.

    Raises:
        OSError, ValueError: the file cannot be read, or is empty.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        view = memoryview(content)
        try:
            return set(_locations(view, 0, len(view), "model", 0))
        finally:
            view.release()


def with_true_places(graph: Path) -> bytes | None:
    """An ONNX file as bytes, for a graph some of whose data files are links to another folder.

    Returns:
        See ``with_data_from_root``; None where ONNX Runtime finds all data beside the graph.

    Raises:
        OSError, ValueError: as ``external_locations``.
    """
    beside = graph.resolve().parent  # ONNX Runtime follows links of the graph, too
    names = external_locations(graph)
    if all((graph.parent / name).resolve().is_relative_to(beside) for name in names):
        return None
    return with_data_from_root(graph.read_bytes(), graph.parent)


def with_data_from_root(model: bytes, folder: Path) -> bytes:
    """An ONNX model that names its data files by their true paths from the file system's root on.

    ONNX Runtime opens it with the root as its ``DATA_FOLDER``.

    Args:
        model: with names of data as seen from ``folder``.
        folder: where the graph lies.
    """
    content = memoryview(model)

    def from_root(name: str) -> bytes:
        place = (folder / name).resolve()
        return os.fsencode(place.relative_to(place.anchor))

    return _renamed(content, 0, len(content), "model", from_root)


def _locations(data: memoryview, start: int, end: int, message: str, depth: int) -> Iterator[str]:
    if depth > _DEEPEST:
        raise _MalformedError("it is nested too deeply")
    if message == "location":
        yield from _location(data, start, end)
        return
    inside = _FIELDS[message]
    for number, _, low, high in _fields(data, start, end):
        if number in inside:
            if low < 0:
                raise _MalformedError(f"field {number} is a number where a {inside[number]} should be")
            yield from _locations(data, low, high, inside[number], depth + 1)


def _renamed(data: memoryview, start: int, end: int, message: str, rename: Callable[[str], bytes]) -> bytes:
    """The bytes of a message, with other names for the external data in it."""
    if message == "location":
        found = next(_location(data, start, end), None)
        return bytes(data[start:end]) if found is None else b"\x0a\x08location\x12" + _sized(rename(found))
    inside = _FIELDS[message]
    parts, copied = [], start
    for number, tag_end, low, high in _fields(data, start, end):
        if number in inside:
            new = _renamed(data, low, high, inside[number], rename)
            parts += [bytes(data[copied:tag_end]), _sized(new)]
            copied = high
    return b"".join([*parts, bytes(data[copied:end])])


def _sized(content: bytes) -> bytes:
    return _varint_bytes(len(content)) + content


def _varint_bytes(value: int) -> bytes:
    """A whole number in base 128, the lowest digits first."""
    digits = bytearray()
    while value >= 0x80:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*digits, value])


def _location(data: memoryview, start: int, end: int) -> Iterator[str]:
    """The value of one entry of ``TensorProto.external_data`` if its key is "location"."""
    entry = {1: b"", 2: b""}
    for number, _, low, high in _fields(data, start, end):
        if number in entry and low >= 0:
            entry[number] = bytes(data[low:high])  # the last one counts, as in protobuf
    if entry[1] == b"location":
        yield entry[2].decode("utf-8")


def _fields(data: memoryview, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(field number, end of its tag, first byte, end) of each field; the last two are -1 for a number."""
    position = start
    while position < end:
        tag, position = _varint(data, position, end)
        number, kind, tag_end = tag >> 3, tag & 7, position
        if kind == _VARINT:
            _, position = _varint(data, position, end)
            yield number, tag_end, -1, -1
            continue
        if kind == _BYTES:
            length, position = _varint(data, position, end)
        elif kind in _FIXED_LENGTHS:
            length = _FIXED_LENGTHS[kind]
        else:
            raise _MalformedError(f"wire type {kind} at byte {position:,}")
        if position + length > end:
            raise _MalformedError(f"a field at byte {position:,} is longer than what holds it")
        first = position if kind == _BYTES else -1
        yield number, tag_end, first, position + length if kind == _BYTES else -1
        position += length


def _varint(data: memoryview, position: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= end:
            raise _MalformedError(f"a number is cut off at byte {position:,}")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise _MalformedError(f"a number of more than 64 bits at byte {position:,}")
