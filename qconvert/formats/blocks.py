"""Weights in blocks: pure functions that pack one tensor and unpack it, and the layout in a graph.

The layout is that of ONNX Runtime's ``MatMulNBits``: a weight ``[N, K]`` is cut along K into blocks that
share one scale (and a zero point); 4-bit values are packed two to a byte, the earlier one in the low half.
"""

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
from qconvert.formats.recipe import HIGHEST_HALVES, LOWEST_HALVES, BlockFormat

if TYPE_CHECKING:
    import torch

# Suffixes of the names of a matrix's initializers.
SCALES = ".scales"
_ZERO_POINTS = ".zero_points"
_RESIDUALS = ".residuals"


@dataclass(frozen=True)
class Blocks:
    """The layout of ``MatMulNBits``; see ``layout.Layout``."""

    fmt: BlockFormat

    def pack(self, weight: torch.Tensor, workers: Executor | None) -> PackedWeight:
        """One matrix, rounded to nearest."""
        return pack(weight, self.fmt, workers)

    def parts(self, rows: int, columns: int) -> tuple[Part, ...]:
        """Codes, scales, zero points and residuals where the format has them; last blocks are filled up."""
        fmt, blocks = self.fmt, -(-columns // self.fmt.block_size)
        found = [
            Part("data", _data_suffix(fmt.bits), "uint8", (rows, blocks, fmt.block_size * fmt.bits // 8)),
            Part("scales", SCALES, fmt.scale_dtype, (rows, blocks)),
        ]
        if not fmt.symmetric:
            found.append(Part("zero_points", _ZERO_POINTS, "uint8", (rows, -(-blocks * fmt.bits // 8))))
        if fmt.residuals:
            found.append(Part("residuals", _RESIDUALS, "float32", (rows, blocks)))
        return tuple(found)

    def pieces(self, packed: Sequence[PackedWeight]) -> Iterator[Iterable[torch.Tensor]]:
        """See ``layout.Layout``."""
        yield [each.data for each in packed]
        yield [each.scales for each in packed]
        if not self.fmt.symmetric:
            yield [each.zero_points for each in packed if each.zero_points is not None]
        if self.fmt.residuals:
            yield [each.residuals for each in packed if each.residuals is not None]


class StoredBlocks:
    """Blocks of a finished graph, mapped; see ``layout.Stored``.

    Args:
        data: uint8 ``[N, B, bytes of a block]``, or an object that is indexed like one.
        scales: ``[N, B]``.
        zero_points: as in ``layout.PackedWeight``.
        residuals: likewise.
        rounding: their format.
        columns: of the matrix, without the padding of its last blocks.
        order: which input each column reads, where they are stored in another order.
    """

    dtype = "uint8"

    def __init__(
        self,
        data: Any,
        scales: NDArray[Any],
        zero_points: NDArray[np.uint8] | None,
        rounding: BlockFormat,
        columns: int,
        *,
        order: NDArray[np.int64] | None = None,
        residuals: NDArray[np.float32] | None = None,
    ) -> None:
        self._data, self._scales, self._zero_points = data, scales, zero_points
        self._residuals = residuals
        self._places = None if order is None else np.argsort(order)
        self.rounding = rounding
        self.shape = (data.shape[0], columns)

    @property
    def scale_rounding(self) -> float:
        """``pack`` rounds scales up, by a whole unit in the last place at most."""
        import torch

        return torch.finfo(torch.bfloat16).eps if self.rounding.scale_dtype == "bfloat16" else 0.0

    def rows(self, wanted: slice | NDArray[np.int64]) -> torch.Tensor:
        """Some rows in float32."""
        return self._unpack(self._data, wanted)

    def _unpack(self, data: Any, wanted: slice | NDArray[np.int64]) -> torch.Tensor:
        zeros, residuals = (
            None if each is None else as_tensor(each[wanted]) for each in (self._zero_points, self._residuals)
        )
        packed = PackedWeight(as_tensor(data[wanted]), as_tensor(self._scales[wanted]), zeros, residuals)
        values = unpack(packed, self.rounding, self.shape[1])
        return values if self._places is None else values[:, self._places]


def find_blocks(arrays: Arrays, name: str, columns: int) -> StoredBlocks | None:
    """A matrix of a finished graph in this layout, or None; see ``stored.LAYOUTS``."""
    for bits in (4, 8):
        if not arrays.has_matrix(name + _data_suffix(bits)):
            continue
        scales = arrays[name + SCALES]
        data = arrays.matrix(name + _data_suffix(bits), scales.shape)
        zeros, residuals = arrays.get(name + _ZERO_POINTS), arrays.get(name + _RESIDUALS)
        fmt = BlockFormat(
            bits,
            data.shape[2] * 8 // bits,
            zeros is None,
            scale_dtype=scales.dtype.name,
            residuals=residuals is not None,
        )
        # The last block of a row may be padded.
        fits = data.shape[1] == -(-columns // fmt.block_size)
        columns = columns if fits else data.shape[1] * fmt.block_size
        order = arrays.order(name + _data_suffix(bits))
        return StoredBlocks(data, scales, zeros, fmt, columns, order=order, residuals=residuals)
    return None


def _data_suffix(bits: int) -> str:
    return f".q{bits}"


def pack(weight: torch.Tensor, fmt: BlockFormat, workers: Executor | None = None) -> PackedWeight:
    """Quantise ``weight`` [N, K] (any float type) by rounding to nearest, block by block.

    Symmetric: scale = max|w| / (2^(bits-1) - 1), zero at 2^(bits-1). In halves: the smallest scale of either
    sign for which all codes lie between -128 and 119.
    Asymmetric: the block's range, widened to contain 0, is divided into 2^bits - 1 steps.

    Args:
        weight: the matrix.
        fmt: how to pack it.
        workers: threads that each take some rows (see ``parallel.piece_workers``); None is this thread alone.

    Raises:
        NonFiniteWeightError: NaN or Inf in the weight, or values beyond what a scale can hold.
    """
    import torch

    rows, columns = weight.shape
    blocks = -(-columns // fmt.block_size)
    padding = blocks * fmt.block_size - columns
    data = torch.empty((rows, blocks, fmt.block_size * fmt.bits // 8), dtype=torch.uint8)
    scales = torch.empty((rows, blocks), dtype=torch.float32)
    zeros = None if fmt.symmetric else torch.empty((rows, blocks), dtype=torch.uint8)

    def pack_rows(part: slice) -> None:
        values = weight[part].to(torch.float32)
        if padding:
            values = torch.nn.functional.pad(values, (0, padding))
        values = values.view(-1, blocks, fmt.block_size)
        codes = _round_blocks(values, fmt, scales[part], None if zeros is None else zeros[part])
        data[part] = _pack_bits(codes, fmt.bits)

    for_each(row_ranges(weight), pack_rows, workers)
    zero_points = None if zeros is None else _pack_zero_points(zeros, fmt.bits)
    return PackedWeight(data, scales.to(getattr(torch, fmt.scale_dtype)), zero_points)


def _round_blocks(
    values: torch.Tensor, fmt: BlockFormat, scales: torch.Tensor, zeros: torch.Tensor | None
) -> torch.Tensor:
    """uint8 codes of ``values`` [n, B, block]; fills ``scales`` and ``zeros`` [n, B]."""
    import torch

    low, high = torch.aminmax(values, dim=-1)
    if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise NonFiniteWeightError
    top = (1 << fmt.bits) - 1
    if zeros is None:
        middle = 1 << (fmt.bits - 1)
        if fmt.halves:  # the end of larger magnitude gets the 128 codes below zero, the other the 119 above
            turned = torch.where(high > -low, -1.0, 1.0)
            large, small = torch.maximum(high, -low), torch.minimum(high, -low)
            scales.copy_(_stored(torch.maximum(large / -LOWEST_HALVES, small / HIGHEST_HALVES), fmt) * turned)
            top = middle + HIGHEST_HALVES
        else:
            scales.copy_(_stored(torch.maximum(high, -low).div_(middle - 1), fmt))
        offset: torch.Tensor | float = float(middle)
    else:
        low, high = low.clamp_(max=0), high.clamp_(min=0)
        scales.copy_(_stored(torch.sub(high, low).div_(top), fmt))
        offset = torch.round(-low / scales).nan_to_num_(0.0).clamp_(0, top)
        zeros.copy_(offset)
        offset = offset.unsqueeze(-1)
    if not is_finite(scales):
        raise NonFiniteWeightError
    # A block of zeros would divide 0 by 0. Any scale stores it exactly: take 1.
    scales.masked_fill_(scales == 0, 1.0)
    codes = values * scales.reciprocal().unsqueeze(-1)
    return codes.round_().add_(offset).clamp_(0, top).to(torch.uint8)


def _stored(steps: torch.Tensor, fmt: BlockFormat) -> torch.Tensor:
    """``steps`` as the format stores them: rounded up, so that the block's ends stay within its range."""
    import torch

    if fmt.scale_dtype == "float32":
        return steps
    # The upper half of a float32 is a bfloat16; adding 0xFFFF first rounds a positive one up.
    return ((steps.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)


def assemble(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, fmt: BlockFormat
) -> PackedWeight:
    """Pack codes that were rounded elsewhere (by GPTQ).

    Args:
        codes: uint8 ``[N, K]``, below 2^bits.
        scales: ``[N, B]`` with B = K / block_size rounded up, in values of ``fmt.scale_dtype``.
        zeros: ``[N, B]``, whole numbers; None for a symmetric format.
        fmt: the format.
    """
    import torch

    rows, columns = codes.shape
    middle = 1 << (fmt.bits - 1)
    padded = torch.nn.functional.pad(codes, (0, scales.shape[1] * fmt.block_size - columns), value=middle)
    return PackedWeight(
        _pack_bits(padded.view(rows, -1, fmt.block_size), fmt.bits).contiguous(),
        scales.to(getattr(torch, fmt.scale_dtype)).contiguous(),
        None if zeros is None else _pack_zero_points(zeros.to(torch.uint8), fmt.bits),
    )


def _pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    if bits == 8:
        return codes
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def _pack_zero_points(zeros: torch.Tensor, bits: int) -> torch.Tensor:
    import torch

    if bits == 4 and zeros.shape[1] % 2:
        zeros = torch.nn.functional.pad(zeros, (0, 1))
    return _pack_bits(zeros, bits).contiguous()


def unpack(packed: PackedWeight, fmt: BlockFormat, columns: int) -> torch.Tensor:
    """The float32 weight ``[N, columns]`` that a packed one stands for."""
    import torch

    def codes(data: torch.Tensor) -> torch.Tensor:
        return (data if fmt.bits == 8 else nibbles(data)).to(torch.float32)

    rows, blocks = packed.scales.shape
    values = codes(packed.data)
    if packed.zero_points is None:
        values -= 1 << (fmt.bits - 1)
    else:
        values -= codes(packed.zero_points)[:, :blocks].unsqueeze(-1)
    values *= packed.scales.float().unsqueeze(-1)
    if packed.residuals is not None:
        values += packed.residuals.unsqueeze(-1)
    return values.reshape(rows, -1)[:, :columns]
