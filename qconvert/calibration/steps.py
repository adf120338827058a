"""Steps and zero points of blocks, searched for the least weighted square error: GPTQ and AWQ share it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from qconvert.formats.recipe import BlockFormat

if TYPE_CHECKING:
    import torch

# Which parts of a block's range its steps may cover: clipping one far weight can pay.
SYMMETRIC_SHARES = (1.0, 0.93, 0.85)
ASYMMETRIC_SHARES = (1.0, 0.9, 0.8)
# Weights that are searched at a time: temporaries of this many stay in the processor's cache.
_PIECE = 1 << 16


def search_steps(
    values: torch.Tensor, importance: torch.Tensor, fmt: BlockFormat, shares: Sequence[float] | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The scale and zero point of each block with the least weighted square error among a few.

    Each share of a block's range gives levels, and these the scale of least squares; the best of them is
    tried once more with the levels that it gives itself.

    Args:
        values: float32 ``[..., block, N]``: a block is a column here.
        importance: of each place of a block, ``[..., block]``.
        fmt: bits, symmetry and the type to which scales are rounded.
        shares: parts of the range; without them those above, and the best is refined.

    Returns:
        float32 scales ``[..., N]`` (negative ones too, where the farthest weight is positive and the format
        symmetric: there is one more step below zero than above), zero points and weighted square errors of
        the same shape. Errors are those before the scales were rounded to their type.
    """
    import torch

    block, lanes = values.shape[-2:]
    scales, zeros, errors = (torch.empty(*values.shape[:-2], lanes) for _ in range(3))
    flat, weights = values.reshape(-1, block, lanes), importance.reshape(-1, block)
    width = max(1, _PIECE // block)
    for group, (matrix, weight) in enumerate(zip(flat, weights, strict=True)):
        for start in range(0, lanes, width):
            part = slice(start, start + width)
            found = _search(matrix[:, part].contiguous(), weight, fmt, shares)
            for result, piece in zip((scales, zeros, errors), found, strict=True):
                result.view(-1, lanes)[group, part] = piece
    return scales, zeros, errors


def _search(
    values: torch.Tensor, weights: torch.Tensor, fmt: BlockFormat, shares: Sequence[float] | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``search_steps`` of blocks ``[block, n]`` that weigh their places alike, ``[block]``."""
    import torch

    top, weighted = (1 << fmt.bits) - 1, values * weights[:, None]

    def best_of(scale: torch.Tensor, zero: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        levels = (values * scale.reciprocal()).round_()
        torch.minimum(torch.maximum(levels, -zero, out=levels), top - zero, out=levels)
        return _least_squares(levels, weighted, weights, scale)

    best: torch.Tensor | None = None
    for wished, zero in _candidates(values, fmt, shares):
        scale, gain = best_of(wished, zero)
        if best is None:
            best, scales, zeros = gain, scale, zero
            continue
        better = gain > best
        best = torch.where(better, gain, best)
        scales, zeros = torch.where(better, scale, scales), torch.where(better, zero, zeros)
    assert best is not None
    if shares is None:
        scale, gain = best_of(scales, zeros)
        scales, best = torch.where(gain > best, scale, scales), torch.maximum(gain, best)
    rounded = scales.to(getattr(torch, fmt.scale_dtype)).float()
    scales = torch.where(rounded == 0, 1.0, rounded)
    return scales, zeros, (weighted * values).sum(0).sub_(best).clamp_(min=0)


def _candidates(
    values: torch.Tensor, fmt: BlockFormat, shares: Sequence[float] | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Scales, never 0, and zero points ``[n]`` to begin with; the first is that of rounding to nearest."""
    import torch

    low, high = torch.aminmax(values, dim=0)
    top, middle = (1 << fmt.bits) - 1, 1 << (fmt.bits - 1)
    if fmt.symmetric:
        farthest, middles = torch.where(high > -low, high, low), torch.full_like(low, middle)
        wished = [(farthest.abs() / (middle - 1), middles)]
        for share in shares or SYMMETRIC_SHARES:
            wished += [
                (farthest * (-share / middle), middles),
                (farthest * (share / (middle - 0.5)), middles),
            ]
    else:
        low, high = low.clamp_(max=0), high.clamp_(min=0)
        scale = (high - low) / top
        wished = [(scale, torch.round(-low / scale))]
        for share in shares or ASYMMETRIC_SHARES:
            shorter = scale * share
            centre = top / 2 - (low + high) / 2 / shorter
            wished += [(shorter, rounded(centre)) for rounded in (torch.floor, torch.ceil)]
    for scale, zero in wished:
        yield torch.where(scale == 0, 1.0, scale), zero.nan_to_num(0.0).clamp_(0, top)


def _least_squares(
    levels: torch.Tensor, weighted: torch.Tensor, weights: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best scale for the ``levels`` that ``scale`` chooses, and how much of ``sum w v^2`` it explains.

    With levels L that is n / d and n^2 / d, where n = sum w v L and d = sum w L^2.
    ``levels`` are overwritten.
    """
    import torch

    numerator = (levels * weighted).sum(0)
    denominator = weights @ levels.square_()
    best = numerator / denominator
    usable = torch.isfinite(best) & (best * scale > 0)
    gain = torch.where(usable, numerator * best, torch.zeros_like(best))
    return torch.where(usable, best, scale), gain
