"""GPTQ: a matrix is rounded column by column, and the columns still to come make up for each error.

Frantar and others, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
2022 (arXiv:2210.17323). The scale of each block is searched when its first column is due, on the
weights as the errors before have moved them.
"""

from __future__ import annotations

from concurrent.futures import Executor
from typing import TYPE_CHECKING

from qconvert.calibration.steps import search_steps
from qconvert.formats.blocks import assemble
from qconvert.formats.layout import PackedWeight
from qconvert.formats.recipe import BlockFormat

if TYPE_CHECKING:
    import torch

# Share of the Hessian's mean diagonal that is added to the diagonal, against noise where tokens are few.
DAMPING = 0.01
# Columns whose errors are spread at once: long runs suit a large Hessian, short ones the processor's cache.
_CHUNK, _SHORT_CHUNK, _LARGEST_GROUP = 128, 32, 256
# Columns whose errors are spread one by one; every block size is a multiple.
_RUN = 8
# Rows that one thread solves at a time.
_ROWS = 768


def inverse_factor(hessian: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """Upper Cholesky factor U of the damped inverse: H^-1 = U^T U, float32 ``[K, K]``.

    Args:
        hessian: mean of x x^T over the inputs x, ``[K, K]``; it is overwritten.
        damping: is raised tenfold until the matrix is positive definite in float32.
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
    """Second moments of the inputs of one product: x in the rounded decoder, t in the true one.

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

        So each layer also corrects errors of the layers before it (as in GPTAQ, arXiv:2504.02692).
        """
        return weight @ self._crossed @ self._upper.t() @ self._upper

    def solve(self, weight: torch.Tensor, fmt: BlockFormat, workers: Executor) -> PackedWeight:
        """Round ``weight`` [N, K] so that its products with x come close to the true ones with t.

        Rows are independent of one another: each of ``workers`` takes some.
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
    codes, scales, zeros = solve_groups(weight, upper[None], fmt)
    return assemble(codes, scales, None if fmt.symmetric else zeros, fmt)


def solve_groups(
    weight: torch.Tensor, upper: torch.Tensor, fmt: BlockFormat
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same where columns make up for the errors of their own group only.

    Args:
        weight: float32 ``[N, K]``, which stays as it is.
        upper: ``inverse_factor`` of each group's part of the Hessian, ``[groups, K / groups, K / groups]``.
        fmt: how the result is stored; its blocks do not reach over a group.

    Returns:
        uint8 codes ``[N, K]``, float32 scales and zero points ``[N, blocks]``, as ``assemble`` takes them.
    """
    import torch

    rows, top = len(weight), (1 << fmt.bits) - 1
    groups, size = upper.shape[:2]
    blocks = -(-size // fmt.block_size)
    # [G, columns of a group, N]: one column of the matrix is one run of memory.
    # clone: where K or N is 1 the transpose is contiguous as it is, and it is written to below.
    left = weight.t().clone(memory_format=torch.contiguous_format).view(groups, size, rows)
    codes = torch.empty((groups, size, rows), dtype=torch.uint8)
    scales, zeros = (torch.empty((groups, blocks, rows)) for _ in range(2))
    diagonal = upper.diagonal(dim1=1, dim2=2)
    importance, shares = diagonal.square().reciprocal(), upper / diagonal[:, :, None]
    chunk = _CHUNK if size > _LARGEST_GROUP else _SHORT_CHUNK
    for first in range(0, size, chunk):
        last = min(first + chunk, size)
        errors = torch.empty((groups, last - first, rows))
        for start in range(first, last, _RUN):
            block, stop = start // fmt.block_size, min(start + _RUN, last)
            if start % fmt.block_size == 0:  # its columns are up to date: blocks are multiples of runs
                inside = slice(start, min(start + fmt.block_size, size))
                scale, zero, _ = search_steps(left[:, inside], importance[:, inside], fmt)
                scales[:, block], zeros[:, block] = scale, zero
                inverse, lowest, highest = scale.reciprocal(), -zero, top - zero
            levels = torch.empty((groups, stop - start, rows))
            for column in range(start, stop):
                values, level = left[:, column], levels[:, column - start]
                torch.clamp(torch.mul(values, inverse, out=level).round_(), lowest, highest, out=level)
                error = errors[:, column - first]
                torch.addcmul(values, level, scale, value=-1, out=error)
                due = shares[:, column, column + 1 : stop, None]
                left[:, column + 1 : stop].addcmul_(due, error[:, None], value=-1)
            codes[:, start:stop] = levels.add_(zero[:, None])
            _spread(
                left[:, stop:last], shares[:, start:stop, stop:last], errors[:, start - first : stop - first]
            )
        _spread(left[:, last:], shares[:, first:last, last:], errors)
    codes, scales, zeros = (part.view(-1, rows).t().contiguous() for part in (codes, scales, zeros))
    return codes, scales, zeros


def _spread(left: torch.Tensor, shares: torch.Tensor, errors: torch.Tensor) -> None:
    """Columns to come ``[G, m, N]`` make up for ``errors`` [G, n, N] of others by ``shares`` [G, n, m]."""
    if left.shape[1]:
        left.baddbmm_(shares.transpose(1, 2), errors, alpha=-1)
