"""Pure functions that pack one tensor in blocks, and unpack it.

The layout is that of ONNX Runtime's ``MatMulNBits``: a weight ``[N, K]`` is cut along K into blocks that
share one scale (and a zero point); 4-bit values are packed two to a byte, the earlier one in the low half.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qconvert.formats.halves import HIGHEST, LOWEST
from qconvert.formats.recipe import BlockFormat

if TYPE_CHECKING:
    import torch

# Rows are packed in pieces of about this many weights: float32 temporaries then stay in the cache.
PIECE = 1 << 19


@dataclass(frozen=True)
class PackedWeight:
    """One packed weight ``[N, K]`` in MatMulNBits' layout, with B = K / block_size rounded up.

    data: uint8 ``[N, B, block_size * bits / 8]``; scales: ``[N, B]`` in the format's type;
    zero_points: uint8 ``[N, ceil(B * bits / 8)]``, or None for a symmetric format.
    """

    data: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None


class NonFiniteWeightError(ValueError):
    """A weight holds NaN or Inf; the caller knows its name."""


def row_ranges(weight: torch.Tensor) -> Iterator[slice]:
    """Cut a tensor along its first axis into ranges of about ``PIECE`` elements."""
    rows = max(1, PIECE // weight[0].numel())
    for start in range(0, weight.shape[0], rows):
        yield slice(start, min(start + rows, weight.shape[0]))


def pack(weight: torch.Tensor, fmt: BlockFormat, workers: Executor | None = None) -> PackedWeight:
    """Quantise ``weight`` [N, K] (any float type) by rounding to nearest, block by block.

    Symmetric: scale = max|w| / (2^(bits-1) - 1), zero at 2^(bits-1). In halves: the smallest scale of either
    sign with which codes reach from -128 to 119.
    Asymmetric: the block's range, widened to contain 0, is divided into 2^bits - 1 steps.

    Args:
        weight: the matrix.
        fmt: how to pack it.
        workers: threads that each take some rows (see ``parallel.piece_workers``); none: this one.

    Raises:
        NonFiniteWeightError: NaN or Inf in the weight.
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

    for _ in (map if workers is None else workers.map)(pack_rows, row_ranges(weight)):
        pass  # waits for each piece, and raises what it raised
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
        if fmt.halves:
            turned = torch.where(high > -low, -1.0, 1.0)  # the larger end takes the larger side
            large, small = torch.maximum(high, -low), torch.minimum(high, -low)
            scales.copy_(_stored(torch.maximum(large / -LOWEST, small / HIGHEST), fmt) * turned)
            top = middle + HIGHEST
        else:
            scales.copy_(_stored(torch.maximum(high, -low).div_(middle - 1), fmt))
        offset: torch.Tensor | float = float(middle)
    else:
        low, high = low.clamp_(max=0), high.clamp_(min=0)
        scales.copy_(_stored(torch.sub(high, low).div_(top), fmt))
        offset = torch.round(-low / scales).nan_to_num_(0.0).clamp_(0, top)
        zeros.copy_(offset)
        offset = offset.unsqueeze(-1)
    # A block of zeros has scale 0: any scale stores it exactly, so take 1 and avoid 0 / 0.
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
    """Pack what somebody else has rounded.

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
        if fmt.bits == 8:
            return data.to(torch.float32)
        return torch.stack((data & 15, data >> 4), dim=-1).flatten(-2).to(torch.float32)

    rows, blocks = packed.scales.shape
    zeros = (
        torch.full((rows, blocks), float(1 << (fmt.bits - 1)))
        if packed.zero_points is None
        else codes(packed.zero_points)[:, :blocks]
    )
    values = (codes(packed.data) - zeros.unsqueeze(-1)) * packed.scales.float().unsqueeze(-1)
    return values.reshape(rows, -1)[:, :columns]
