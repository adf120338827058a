"""The checkpoint's tensors, one at a time, and the data file into which they go.

Both ends keep memory bounded: a tensor's mapped pages are given back once it has been used, and the
data file is written as the graph is described, so that no more than one packed tensor is in memory.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

# ONNX Runtime maps external data. A large tensor begins with a page, so that no two share one; small ones
# only with a cache line: a page each would be most of a megabyte for a model of 135M.
ALIGNMENT = 4096
SMALL_ALIGNMENT = 64
_LARGE = 1 << 20
_MADV_DONTNEED = 4


class CheckpointWeights:
    """Named tensors of a loaded model. ``release`` drops a mapped tensor's pages from memory."""

    def __init__(self, model: Any, on_use: Callable[[str, int], None] | None = None) -> None:
        self._tensors: dict[str, torch.Tensor] = dict(model.state_dict(keep_vars=False))
        self._mapped = _mapped_safetensors()
        self._on_use = on_use

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name].detach()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def release(self, name: str) -> None:
        """Say that ``name`` has been used: its file pages leave the resident set (and can come back)."""
        tensor = self._tensors[name]
        start = tensor.data_ptr()
        stop = start + tensor.numel() * tensor.element_size()
        if self._on_use is not None:
            self._on_use(name, tensor.numel())
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        last = stop // mmap.PAGESIZE * mmap.PAGESIZE
        # Only clean pages of a file may be dropped: anonymous memory would come back as zeros.
        if last > first and any(low <= first and last <= high for low, high in self._mapped):
            ctypes.CDLL(None).madvise(
                ctypes.c_void_p(first), ctypes.c_size_t(last - first), ctypes.c_int(_MADV_DONTNEED)
            )


def _mapped_safetensors() -> list[tuple[int, int]]:
    """Address ranges into which this process has mapped safetensors files (Linux; else none)."""
    ranges = []
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        fields = line.split(maxsplit=5)
        # Hub caches name the mapped file by its hash: any private file mapping of data will do.
        if len(fields) == 6 and fields[5].startswith("/") and "x" not in fields[1] and fields[4] != "0":
            low, high = (int(address, 16) for address in fields[0].split("-"))
            ranges.append((low, high))
    return ranges


class DataFile:
    """An ONNX external data file that is written from front to back.

    Use as a context manager; ``add`` returns an initializer that points into the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb", buffering=0)  # numpy's tofile writes to the descriptor itself

    def __enter__(self) -> DataFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def add(
        self,
        name: str,
        tensors: Iterable[torch.Tensor],
        shape: Iterable[int],
        dtype: ir.DataType | None = None,
    ) -> ir.Value:
        """Append a tensor given in pieces along its first axis.

        Args:
            name: the initializer's.
            tensors: the pieces.
            shape: of the whole.
            dtype: what the bytes mean, where PyTorch has no such type (int4, two to a byte).

        Raises:
            OSError: no space left, or whatever else the disk says.
        """
        sizes, offset = tuple(shape), None
        for piece in tensors:
            if offset is None:
                large = piece.element_size() * math.prod(sizes) >= _LARGE
                self._file.write(b"\0" * (-self._file.tell() % (ALIGNMENT if large else SMALL_ALIGNMENT)))
                offset = self._file.tell()
            dtype = dtype or _ir_dtype(piece)
            _as_numpy(piece.contiguous()).tofile(self._file)
        assert dtype is not None, f"{name} has no pieces"
        assert offset is not None, f"{name} has no pieces"
        return self.view(name, dtype, sizes, offset, self._file.tell() - offset)

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
        name = f"{tensor.name}.from_{start}"
        return self.view(name, tensor.dtype, shape, tensor.offset + start * row, shape[0] * row)


def _ir_dtype(tensor: torch.Tensor) -> ir.DataType:
    import torch

    return {
        torch.float32: ir.DataType.FLOAT,
        torch.float16: ir.DataType.FLOAT16,
        torch.bfloat16: ir.DataType.BFLOAT16,
        torch.uint8: ir.DataType.UINT8,
        torch.int8: ir.DataType.INT8,
    }[tensor.dtype]


def _as_numpy(tensor: torch.Tensor) -> NDArray[Any]:
    import torch

    # NumPy has no bfloat16: its bits are written as they are.
    array: NDArray[Any] = (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array
