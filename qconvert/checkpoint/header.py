"""A safetensors file's header: which tensors it holds, and whether all their bytes are there.

Format: 8 bytes of length, that many bytes of JSON, then the tensors at the offsets that the JSON names.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

from qconvert.checkpoint.file_state import BrokenFileError

_MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
DTYPE_BITS = {
    **{"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6},
    **{"F6_E3M2": 6, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32},
    **{"U64": 64, "I64": 64, "F64": 64, "C64": 64},
}


def read_header(path: Path, size: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape by tensor name; the file's length must be 8 + header + the last offset.

    Args:
        path: the file.
        size: its length in bytes.

    Raises:
        BrokenFileError: truncated, or no safetensors file.
    """
    if size < 8:
        raise BrokenFileError("truncated", f"{size} bytes: not even a header")
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if not 2 <= length <= _MAX_HEADER_BYTES:
            raise BrokenFileError("garbage", f"not a safetensors file: a header of {length:,} bytes")
        if 8 + length > size:
            raise BrokenFileError(
                "truncated", f"{size:,} bytes on disk, the header alone needs {8 + length:,}"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        parsed = {name: _parse_entry(entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BrokenFileError("garbage", f"not a safetensors header: {error}") from error

    end = 0
    for name, (_, _, begin, stop) in sorted(parsed.items(), key=lambda item: item[1][2:]):
        if begin != end:
            raise BrokenFileError("garbage", f"{name} begins at offset {begin:,}, not at {end:,}")
        end = stop
    if size < 8 + length + end:
        raise BrokenFileError("truncated", f"{size:,} of {8 + length + end:,} bytes on disk")
    if size > 8 + length + end:
        raise BrokenFileError("garbage", f"{size:,} bytes on disk, the header describes {8 + length + end:,}")
    return {name: (dtype, shape) for name, (dtype, shape, _, _) in parsed.items()}


def _parse_entry(entry: dict[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    dtype, shape, (begin, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if dtype not in DTYPE_BITS:
        raise ValueError(f"unknown dtype {dtype!r}")
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, stop)):
        raise ValueError(f"shape {shape} or offsets {begin}, {stop} are no sizes")
    if (stop - begin) * 8 != math.prod(shape) * DTYPE_BITS[dtype]:
        raise ValueError(f"{stop - begin} bytes for shape {shape} of {dtype}")
    return dtype, shape, begin, stop
