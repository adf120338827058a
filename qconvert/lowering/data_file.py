"""The data file beside a graph, which holds its large tensors.

It is written while the graph is described, so that no more than one packed tensor is in memory.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from qconvert.formats.layout import part_name

DATA_NAME = "model.onnx.data"  # beside the graph that decodes
# ONNX Runtime maps external data. A large tensor begins on a page of its own; a small one only on a cache
# line, since a page for each would take most of a megabyte in a model of 135M.
ALIGNMENT = 4096
SMALL_ALIGNMENT = 64
_LARGE = 1 << 20
# Element types by the names that PyTorch and ``formats.layout.Part`` give them.
DTYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "uint8": ir.DataType.UINT8,
    "int8": ir.DataType.INT8,
    "int32": ir.DataType.INT32,
    "int4": ir.DataType.INT4,
}


# What is told when a file is complete: its path and its SHA-256 in hexadecimal.
Told = Callable[[Path, str], None]


class DataFile:
    """An ONNX external data file that is written from front to back.

    Use as a context manager; ``add`` returns an initializer that points into the file. Another thread hashes
    what is written, so that nobody has to read gigabytes again for it.

    Args:
        path: of the file.
        told: is called on the way out, unless by an error.
    """

    def __init__(self, path: Path, told: Told | None = None) -> None:
        self.path = path
        self.size = 0  # in bytes
        self._told = told
        self._digest = hashlib.sha256()
        self._hashes = ThreadPoolExecutor(1, thread_name_prefix="hash")
        self._hashing: Future[None] | None = None
        self._file = path.open("wb", buffering=0)

    def __enter__(self) -> DataFile:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        self._hashes.shutdown()
        self._file.close()
        if self._told is not None and error is None:
            self._told(self.path, self._digest.hexdigest())

    def beside(self, name: str) -> DataFile:
        """Another data file in the same folder."""
        return DataFile(self.path.with_name(name), self._told)

    def add(
        self, name: str, tensors: Iterable[torch.Tensor], shape: Iterable[int], dtype: ir.DataType
    ) -> ir.Value:
        """Append a tensor given in pieces along its first axis.

        Args:
            name: the initializer's.
            tensors: the pieces.
            shape: of the whole, in elements.
            dtype: of its elements; of those with 4 bits, the pieces hold two to a byte.

        Raises:
            OSError: no space left, or whatever else the disk says.
        """
        sizes = tuple(shape)
        length = math.prod(sizes) * dtype.bitwidth // 8
        alignment = ALIGNMENT if length >= _LARGE else SMALL_ALIGNMENT
        offset = -(-self.size // alignment) * alignment
        self._write(offset - self.size, tensors)
        self.size = offset + length
        return self.view(name, dtype, sizes, offset, length)

    def view(
        self, name: str, dtype: ir.DataType, shape: tuple[int, ...], offset: int, length: int
    ) -> ir.Value:
        """An initializer over bytes that are already in the file (a tied tensor is stored once)."""
        tensor = ir.ExternalTensor(
            self.path.name, offset, length, dtype, shape=ir.Shape(shape), name=name, base_dir=self.path.parent
        )
        return ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(dtype), const_value=tensor)

    def view_rows(self, value: ir.Value, rows: slice) -> ir.Value:
        """Some rows of a tensor that is already in the file, as an initializer of its own."""
        tensor = value.const_value
        assert isinstance(tensor, ir.ExternalTensor)
        assert tensor.offset is not None
        assert tensor.length is not None
        count, *rest = tensor.shape.numpy()
        row, start = tensor.length // count, rows.start
        shape = (rows.stop - start, *rest)
        name = part_name(str(tensor.name), start)
        return self.view(name, tensor.dtype, shape, tensor.offset + start * row, shape[0] * row)

    def _write(self, padding: int, tensors: Iterable[torch.Tensor]) -> None:
        self._write_all(memoryview(b"\0" * padding))
        for piece in tensors:
            array = np.ascontiguousarray(_as_numpy(piece.contiguous()))
            self._write_all(memoryview(array.reshape(-1).view(np.uint8).data))

    def _write_all(self, content: memoryview) -> None:
        # The system may write less than it was given, and says only when asked again that the disk is full.
        # NumPy's tofile does not ask again, and tells "N requested and M written" without the reason.
        rest = content
        while rest:
            rest = rest[self._file.write(rest) :]
        if self._hashing is not None:
            self._hashing.result()  # so that at most two pieces are in memory
        self._hashing = self._hashes.submit(self._digest.update, content)


def _as_numpy(tensor: torch.Tensor) -> NDArray[Any]:
    # NumPy has no bfloat16: its bits are written as they are.
    array: NDArray[Any] = (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array
