"""GPTQ: a matrix is rounded column by column, and the columns still to come make up for each error.

Frantar and others, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
2022 (arXiv:2210.17323). The scale of each block is searched when its first column is due, on the
weights as the errors before have moved them.
"""

from __future__ import annotations

from concurrent.futures import Executor
from typing import TYPE_CHECKING

from qconvert.formats.blocks import assemble
from qconvert.formats.layout import PackedWeight
from qconvert.formats.recipe import BlockFormat

if TYPE_CHECKING:
    import torch

# Share of the Hessian's mean diagonal that is added to it: what few tokens say of many inputs is noise.
DAMPING = 0.01
_CHUNK = 128
# Rows that one thread solves at a time.
_ROWS = 768
# Which parts of a block's range its steps may cover: clipping one far weight can pay.
_SYMMETRIC_SHARES = (1.0, 0.93, 0.85)
_ASYMMETRIC_SHARES = (1.0, 0.9, 0.8)


def inverse_factor(hessian: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """Upper Cholesky factor U of the damped inverse: H^-1 = U^T U, float32 ``[K, K]``.

    Args:
        hessian: mean of x x^T over the inputs x, ``[K, K]``; it is overwritten.
        damping: more is tried where the matrix is not positive definite in float32.
    """
    import torch

    diagonal = hessian.diagonal()
    mean = float(diagonal.mean()) or 1.0
    while True:
        diagonal += damping * mean
        factor, info = torch.linalg.cholesky_ex(hessian)
        if not int(info):
            inverse = torch.cholesky_inverse(factor)
            del factor
            upper: torch.Tensor
            upper, info = torch.linalg.cholesky_ex(inverse, upper=True)
            if not int(info):
                return upper
        damping *= 10
        assert damping < 1e6, "a Hessian with this much on its diagonal is positive definite"


class Means:
    """What the inputs of one product are like, x in the rounded decoder and t in the true one.

    Args:
        squares: mean of x x^T, float32 ``[K, K]``; it is overwritten.
        crossed: mean of t x^T; likewise.

    Attributes:
        finite: False where an input was NaN or Inf; then nothing can be solved.
    """

    def __init__(self, squares: torch.Tensor, crossed: torch.Tensor) -> None:
        import math

        mean = float(squares.diagonal().mean())
        self.finite = math.isfinite(mean) and math.isfinite(float(crossed.sum()))
        if self.finite:
            self._crossed = crossed
            self._crossed.diagonal().add_(DAMPING * mean)
            self._upper = inverse_factor(squares)

    def aim(self, weight: torch.Tensor) -> torch.Tensor:
        """The weights whose products with x are closest to those of ``weight`` with t.

        So each layer also mends what the layers before it have broken (as in GPTAQ, arXiv:2504.02692).
        """
        return weight @ self._crossed @ self._upper.t() @ self._upper

    def solve(self, weight: torch.Tensor, fmt: BlockFormat, workers: Executor) -> PackedWeight:
        """Round ``weight`` [N, K] so that its products with x come close to the true ones with t.

        Rows do not know of one another: each of ``workers`` takes some.
        """
        import torch

        pieces = [weight[start : start + _ROWS] for start in range(0, len(weight), _ROWS)]
        parts = list(workers.map(lambda rows: solve(self.aim(rows), self._upper, fmt), pieces))
        zeros = [part.zero_points for part in parts if part.zero_points is not None]
        return PackedWeight(
            torch.cat([part.data for part in parts]),
            torch.cat([part.scales for part in parts]),
            torch.cat(zeros) if zeros else None,
        )


def solve(weight: torch.Tensor, upper: torch.Tensor, fmt: BlockFormat) -> PackedWeight:
    """Round ``weight`` so that the products with the calibration's inputs change least.

    Args:
        weight: float32 ``[N, K]``, which stays as it is.
        upper: ``inverse_factor`` of the inputs' Hessian.
        fmt: how the result is stored.

    """
    import torch

    rows, columns = weight.shape
    blocks = -(-columns // fmt.block_size)
    left = weight.t().contiguous()  # [K, N]: one column of the matrix is one run of memory
    codes = torch.zeros((columns, rows), dtype=torch.uint8)
    scales, zeros = (torch.empty((blocks, rows)) for _ in range(2))
    top, chunk = (1 << fmt.bits) - 1, max(_CHUNK, fmt.block_size)
    for first in range(0, columns, chunk):
        last = min(first + chunk, columns)
        values, factor = left[first:last], upper[first:last, first:last]
        importance = factor.diagonal().square().reciprocal()
        errors = torch.empty_like(values)
        for place in range(last - first):
            column, block = first + place, (first + place) // fmt.block_size
            if column % fmt.block_size == 0:
                inside = slice(place, min(place + fmt.block_size, last - first))
                scales[block], zeros[block] = search_steps(values[inside], importance[inside], fmt)
            code = (values[place] / scales[block]).round_().add_(zeros[block]).clamp_(0, top)
            codes[column] = code.to(torch.uint8)
            stored = (code - zeros[block]) * scales[block]
            errors[place] = (values[place] - stored) / factor[place, place]
            values[place + 1 :].addr_(factor[place, place + 1 :], errors[place], alpha=-1)
        left[last:] -= upper[first:last, last:].t() @ errors
    return assemble(codes.t(), scales.t(), None if fmt.symmetric else zeros.t(), fmt)


def search_steps(
    values: torch.Tensor, importance: torch.Tensor, fmt: BlockFormat
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and zero point of each block with the least weighted square error among a few.

    Args:
        values: float32 ``[block, N]``: a block is a column here.
        importance: of each place of a block, ``[block]``.
        fmt: bits, symmetry and the type to which scales are rounded.

    Returns:
        float32 scales ``[N]`` (negative ones too, where the farthest weight is positive and the format
        symmetric: there is one more step below zero than above) and zero points ``[N]``.
    """
    import torch

    low, high = torch.aminmax(values, dim=0)
    scale_dtype = getattr(torch, fmt.scale_dtype)
    top, middle, weights = (1 << fmt.bits) - 1, 1 << (fmt.bits - 1), importance[:, None]
    candidates = []
    if fmt.symmetric:
        farthest = torch.where(high > -low, high, low)
        middles = torch.full_like(low, middle)
        candidates += [(farthest * (-share / middle), middles) for share in _SYMMETRIC_SHARES]
        candidates += [(farthest * (share / (middle - 0.5)), middles) for share in _SYMMETRIC_SHARES]
        candidates += [(farthest.abs() / (middle - 1), middles)]
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
        for share in _ASYMMETRIC_SHARES:
            scale = (high - low) * (share / top)
            centre = top / 2 - (low + high) / 2 / scale
            candidates += [(scale, rounded(centre)) for rounded in (torch.floor, torch.ceil)]
        scale = (high - low) / top
        candidates += [(scale, torch.round(-low / scale))]
    best: torch.Tensor | None = None
    for wished, centre in candidates:
        zero = centre.nan_to_num(0.0).clamp(0, top)
        first = torch.where(wished == 0, 1.0, wished)
        for exact in (first, _best_scale(values, first, zero, weights, top)):
            scale = exact.to(scale_dtype).float()
            levels = (values / scale).round_().add_(zero).clamp_(0, top).sub_(zero)
            error = ((levels * scale - values).square_() * weights).sum(0)
            if best is None:
                best, scales, zeros = error, scale, zero
                continue
            better = error < best
            best = torch.where(better, error, best)
            scales, zeros = torch.where(better, scale, scales), torch.where(better, zero, zeros)
    return scales, zeros


def _best_scale(
    values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, weights: torch.Tensor, top: int
) -> torch.Tensor:
    """The scale of least squares for the levels that ``scale`` chooses."""
    import torch

    levels = (values / scale).round_().add_(zero).clamp_(0, top).sub_(zero)
    weighted = levels * weights
    best = (weighted * values).sum(0) / (weighted * levels).sum(0)
    return torch.where(torch.isfinite(best) & (best != 0), best, scale)
