"""Signed 4-bit weights as TensorRT takes them: ``[K, N]``, blocks along K, scales without zero points."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qconvert.formats.layout import (
    Arrays,
    NonFiniteWeightError,
    PackedWeight,
    Part,
    as_tensor,
    for_each,
    is_finite,
    nibbles,
    row_ranges,
)
from qconvert.formats.recipe import BlockFormat

if TYPE_CHECKING:
    import torch

BLOCK_SIZES = (16, 32, 64, 128)
_DATA, _SCALES = ".int4", ".int4_scales"
_LARGEST = 7  # -8 is not used, so that both signs have the same range


@dataclass(frozen=True)
class Int4Columns:
    """The layout of TensorRT's 4-bit weights; see ``layout.Layout``."""

    block_size: int
    scale_dtype: str

    def pack(self, weight: torch.Tensor, workers: Executor | None) -> PackedWeight:
        """One matrix, rounded to nearest."""
        import torch

        return PackedWeight(
            *pack_int4_columns(weight, self.block_size, getattr(torch, self.scale_dtype), workers)
        )

    def repack(self, packed: PackedWeight) -> PackedWeight:
        """A symmetric matrix that comes in ``blocks.Blocks`` of 4 bits: its own codes, turned round.

        Raises:
            NonFiniteWeightError: a scale that the type of scales here cannot hold.
        """
        import torch

        codes = nibbles(packed.data).flatten(1)
        signed = (codes ^ 8).t().contiguous()  # of a code about 8 the same number about 0, in four bits
        scales = packed.scales.t().to(getattr(torch, self.scale_dtype)).contiguous()
        if not is_finite(scales):
            raise NonFiniteWeightError
        return PackedWeight(signed[:, 0::2] | (signed[:, 1::2] << 4), scales)

    def parts(self, rows: int, columns: int) -> tuple[Part, ...]:
        """Numbers of 4 bits, and their scales."""
        return (
            Part("data", _DATA, "int4", (columns, rows)),
            Part("scales", _SCALES, self.scale_dtype, (columns // self.block_size, rows)),
        )

    def pieces(self, packed: Sequence[PackedWeight]) -> Iterator[Iterable[torch.Tensor]]:
        """See ``layout.Layout``."""
        import torch

        yield [torch.cat([each.data for each in packed], 1)]
        yield [torch.cat([each.scales for each in packed], 1)]


class StoredColumns:
    """A matrix of a finished graph, mapped; see ``layout.Stored``.

    Args:
        tensor: onnx_ir's external int4 tensor ``[K, N]``.
        scales: ``[K / block_size, N]``.
    """

    dtype = "uint8"

    def __init__(self, tensor: Any, scales: torch.Tensor) -> None:
        inputs, outputs = (int(size) for size in tensor.shape)
        self._data: NDArray[np.uint8] = np.memmap(
            tensor.path, np.uint8, "r", tensor.offset or 0, (inputs, outputs // 2)
        )
        self.shape = (outputs, inputs)
        self._scales = scales
        self.rounding = BlockFormat(4, inputs // scales.shape[0], symmetric=True)

    @property
    def scale_rounding(self) -> float:
        """Scales are rounded to the nearest number of their type."""
        import torch

        return torch.finfo(self._scales.dtype).eps / 2

    def rows(self, wanted: slice | NDArray[np.int64]) -> torch.Tensor:
        """Some rows of the checkpoint's matrix in float32 ``[rows, K]``."""
        assert isinstance(wanted, slice), "only an embedding is looked up, which is never stored so"
        pair = slice(wanted.start // 2, -(-wanted.stop // 2))
        data = as_tensor(self._data[:, pair])
        found = unpack_int4_columns(data, self._scales[:, 2 * pair.start : 2 * pair.stop])
        return found[wanted.start - 2 * pair.start :][: wanted.stop - wanted.start]


def find_columns(arrays: Arrays, name: str, columns: int) -> StoredColumns | None:
    """A matrix of a finished graph in this layout, or None; see ``stored.LAYOUTS``."""
    if name + _DATA not in arrays:
        return None
    return StoredColumns(arrays.tensor(name + _DATA), as_tensor(arrays[name + _SCALES]))


def pack_int4_columns(
    weight: torch.Tensor, block_size: int, scale_dtype: torch.dtype, workers: Executor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a checkpoint's matrix ``[N, K]`` to nearest, and transpose it to ``[K, N]``.

    The scale of a block is max|w| / 7. It is rounded to ``scale_dtype`` before the values are divided by it,
    so that they are rounded to the nearest multiple of the stored scale.

    Returns:
        uint8 ``[K, N / 2]``, two values to a byte with the earlier column in the low half, and
        scales ``[K / block_size, N]``.

    Raises:
        NonFiniteWeightError: NaN or Inf in the weight, or values beyond what a scale can hold.
    """
    import torch

    rows, columns = weight.shape
    assert rows % 2 == 0, "a row of the packed matrix must end with a whole byte"
    assert columns % block_size == 0, "the recipe chose a block size that does not divide the matrix"
    data = torch.empty((columns, rows // 2), dtype=torch.uint8)
    scales = torch.empty((columns // block_size, rows), dtype=scale_dtype)

    def pack_rows(part: slice) -> None:
        values = weight[part].to(torch.float32)
        if not is_finite(values):
            raise NonFiniteWeightError
        values = values.view(values.shape[0], -1, block_size)
        steps = (values.abs().amax(-1) / _LARGEST).to(scale_dtype)
        if not is_finite(steps):
            raise NonFiniteWeightError
        # The block holds zeros, or values too small for the scale's type: any scale stores zeros.
        steps.masked_fill_(steps == 0, 1.0)
        codes = (values / steps.float().unsqueeze(-1)).round_().clamp_(-_LARGEST, _LARGEST)
        low = codes.to(torch.int8).flatten(1).t().contiguous().view(torch.uint8) & 15
        data[:, part.start // 2 : part.stop // 2] = low[:, 0::2] | (low[:, 1::2] << 4)
        scales[:, part] = steps.t()

    for_each(_even(row_ranges(weight), rows), pack_rows, workers)
    return data, scales


def unpack_int4_columns(data: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The float32 weight ``[N, K]`` that packed columns stand for."""
    import torch

    codes = nibbles(data).to(torch.int8)
    values = torch.where(codes > _LARGEST, codes - 16, codes).float()
    block_size = values.shape[0] // scales.shape[0]
    return (values * scales.float().repeat_interleave(block_size, 0)).t()


def _even(ranges: Iterable[slice], rows: int) -> list[slice]:
    """The same ranges with even bounds, since two rows share a byte."""
    cuts = sorted({part.stop // 2 * 2 for part in ranges} - {0} | {rows})
    return [slice(start, stop) for start, stop in zip([0, *cuts], cuts)]
