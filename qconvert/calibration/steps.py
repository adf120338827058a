"""Steps and zero points of blocks, searched for the least weighted square error: GPTQ and AWQ share it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qconvert.formats.recipe import BlockFormat

if TYPE_CHECKING:
    import torch

# Which parts of a block's range its steps may cover: clipping one far weight can pay. In symmetric blocks of
# 32 weights of the sample these leave 1.01 times the error that a search of 60 steps leaves.
SYMMETRIC_SHARES = (1.0, 0.9, 0.8)
ASYMMETRIC_SHARES = (0.9,)
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
        float32 scales ``[..., N]``, zero points and weighted square errors of the same shape. Scales are
        positive, as TensorRT's parser wants them: it is the target of symmetric blocks, in which there is one
        more step below zero than above. Errors are those before the scales were rounded to their type.
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

    trial = _Trial(values, weights, fmt)
    wished, zeros = _candidates(values, fmt, shares)
    scales, gains = trial.least_squares(wished, zeros)
    best, choice = gains.max(0)
    scale, zero = (tried.gather(0, choice[None])[0] for tried in (scales, zeros))
    if shares is None:
        refined, gain = (found[0] for found in trial.least_squares(scale[None], zero[None]))
        scale, best = torch.where(gain > best, refined, scale), torch.maximum(gain, best)
    rounded = scale.to(getattr(torch, fmt.scale_dtype)).float()
    scale = torch.where(rounded == 0, 1.0, rounded)
    return scale, zero, trial.total().sub_(best).clamp_(min=0)


class _Trial:
    """Blocks ``[block, n]`` for which scales are tried. What is as large as they are is allocated once."""

    def __init__(self, values: torch.Tensor, weights: torch.Tensor, fmt: BlockFormat) -> None:
        import torch

        self._values, self._weights, self._top = values, weights, (1 << fmt.bits) - 1
        self._weighted = values * weights[:, None]
        self._levels, self._product = torch.empty_like(values), torch.empty_like(values)

    def least_squares(self, scales: torch.Tensor, zeros: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The best scales for the levels that each of ``scales`` chooses, and what they explain of ``total``.

        With levels L they are n / d and n^2 / d, where n = sum w v L and d = sum w L^2.

        Args:
            scales: none of them 0, ``[C, n]``.
            zeros: zero points, of the same shape.
        """
        import torch

        inverse, lowest, highest = scales.reciprocal(), -zeros, self._top - zeros
        numerator, denominator = torch.empty_like(scales), torch.empty_like(scales)
        levels, product = self._levels, self._product
        for index in range(len(scales)):
            torch.mul(self._values, inverse[index], out=levels).round_()
            torch.clamp(levels, lowest[index], highest[index], out=levels)
            torch.sum(torch.mul(levels, self._weighted, out=product), 0, out=numerator[index])
            torch.mv(levels.square_().t(), self._weights, out=denominator[index])
        best = numerator / denominator
        usable = torch.isfinite(best) & (best * scales > 0)
        return torch.where(usable, best, scales), torch.where(usable, numerator * best, 0.0)

    def total(self) -> torch.Tensor:
        """sum w v^2, ``[n]``."""
        import torch

        return torch.mul(self._weighted, self._values, out=self._product).sum(0)


def _candidates(
    values: torch.Tensor, fmt: BlockFormat, shares: Sequence[float] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales, never 0, and zero points ``[C, n]`` to begin with; the first is that of rounding to nearest."""
    import torch

    low, high = values.amin(0), values.amax(0)
    top, middle = (1 << fmt.bits) - 1, 1 << (fmt.bits - 1)
    if fmt.symmetric:
        whole = torch.maximum(high / (middle - 1), low / -middle)  # nothing is cut off, at either end
        wished = [torch.maximum(high, -low) / (middle - 1)]
        scales = torch.stack(
            [*wished, *(whole * share for share in (SYMMETRIC_SHARES if shares is None else shares))]
        )
        zeros = torch.full_like(scales, middle)
    else:
        low, high = low.clamp_(max=0), high.clamp_(min=0)
        scale = (high - low) / top
        wished, zero = [scale], [torch.round(-low / scale)]
        for share in ASYMMETRIC_SHARES if shares is None else shares:
            shorter = scale * share
            centre = top / 2 - (low + high) / 2 / shorter
            wished += [shorter, shorter]
            zero += [torch.floor(centre), torch.ceil(centre)]
        scales, zeros = torch.stack(wished), torch.stack(zero)
    return torch.where(scales == 0, 1.0, scales), zeros.nan_to_num_(0.0).clamp_(0, top)
