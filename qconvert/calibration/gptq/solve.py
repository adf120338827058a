"""GPTQ: a matrix is rounded column by column, and the columns still to come make up for each error.

Frantar and others, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
2022 (arXiv:2210.17323). The scale of each block is searched when its first column is due, on the
weights as the errors before have moved them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qconvert.calibration.steps import search_steps
from qconvert.formats.blocks import assemble
from qconvert.formats.layout import PackedWeight
from qconvert.formats.recipe import BlockFormat

if TYPE_CHECKING:
    import torch

# Share of the Hessian's mean diagonal that is added to the diagonal, against noise where tokens are few: with
# less a matrix learns the calibration text by heart. Mean KL of the sample by gptq with 0.01, 0.1, 0.3, 0.5
# and 1: 0.122, 0.117, 0.102, 0.105 and 0.108.
DAMPING = 0.3
# The same in the groups of awq, where it matters little: 0.175, and 0.176 with 0.3.
DAMPING_OF_GROUPS = 0.01
# Columns of a whole matrix that are solved together; those to come are not touched before they are due.
_CHUNK = 128
# Of these, columns whose errors are spread at once, and one by one; block sizes are multiples of the latter.
_RUNS, _RUN = 32, 8
# Rows that one thread solves at a time, at most; there is an even number of pieces, so that two threads end
# together.
_ROWS, _TURNS = 4096, 2

# uint8 codes [N, K], float32 scales and zero points [N, blocks], as ``assemble`` takes them.
Solution = tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]


@dataclass(frozen=True)
class _Range:
    """What the codes of a block of each row may be: scale and zero point ``[G, N]``, the levels' ends."""

    scale: torch.Tensor
    zero: torch.Tensor
    lowest: torch.Tensor
    highest: torch.Tensor


def inverse_factor(hessian: torch.Tensor, damping: float = DAMPING_OF_GROUPS) -> torch.Tensor:
    """Upper Cholesky factor U of the damped inverse: H^-1 = U^T U, float32 ``[K, K]``.

    Args:
        hessian: mean of x x^T over the inputs x, ``[K, K]``; it is overwritten.
        damping: is raised tenfold until the matrix is positive definite in float32.
    """
    import torch

    for factor in _factors(hessian, damping):
        upper: torch.Tensor
        upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
        if not int(info):
            return upper
    raise AssertionError("there is always another damping")


def upper_triangle(hessian: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """Upper triangle R of the damped Hessian: H = R R^T, float32 ``[K, K]``; R^-1 is ``inverse_factor``.

    Args:
        hessian: mean of x x^T over the inputs x, ``[K, K]``, of which what is below the diagonal is not read.
        damping: is raised tenfold until the matrix is positive definite in float32.
    """

    # Factors of the library begin with the first row; this one begins with the last.
    return next(_factors(hessian.flip(0, 1), damping)).flip(0, 1)


def _factors(hessian: torch.Tensor, damping: float) -> Iterator[torch.Tensor]:
    """Lower Cholesky factors of the Hessian, with more and more on its diagonal."""
    import torch

    diagonal = hessian.diagonal()
    mean = float(diagonal.mean()) or 1.0
    while damping < 1e6:
        diagonal += damping * mean
        factor, info = torch.linalg.cholesky_ex(hessian)
        if not int(info):
            yield factor
        damping *= 10
    raise AssertionError("a Hessian with this much on its diagonal is positive definite")


class Means:
    """Second moments of the inputs of one product: x in the rounded decoder, t in the true one.

    Args:
        squares: mean of x x^T, float32 ``[K, K]``, of which what is below the diagonal is not read.
        missing: mean of (t - x) x^T, likewise; or that of W (t - x) x^T for the weights W ``[N, K]`` of all
            matrices that read x, where N is less than K.
        damping: see ``upper_triangle``.

    Attributes:
        finite: False where an input was NaN or Inf; then nothing can be solved.
    """

    def __init__(self, squares: torch.Tensor, missing: torch.Tensor, damping: float = DAMPING) -> None:
        import math

        mean = float(squares.diagonal().mean())
        self.finite = math.isfinite(mean) and math.isfinite(float(missing.sum()))
        if self.finite:
            self._missing = missing
            self._triangle = upper_triangle(squares, damping)

    def solve(
        self, weights: Mapping[str, torch.Tensor], fmt: BlockFormat, workers: Executor
    ) -> dict[str, PackedWeight]:
        """Round ``weights`` [N, K] so that their products with x come close to the true ones with t.

        So each layer also corrects errors of the layers before it (as in GPTAQ, arXiv:2504.02692).
        Rows are independent of one another: each of ``workers`` takes some.
        """
        import torch

        weight = torch.cat(list(weights.values()))
        narrow = len(self._missing) < weight.shape[1]

        def solved(rows: slice) -> Solution:
            part = weight[rows]
            missing = self._missing[rows] if narrow else part @ self._missing
            return solve(part, self._triangle, fmt, missing)

        count = -(-len(weight) // _ROWS) * _TURNS
        step = -(-len(weight) // count)
        cuts = [slice(start, start + step) for start in range(0, len(weight), step)]
        parts = zip(*workers.map(solved, cuts), strict=True)
        codes, scales, zeros = (torch.cat(part) for part in parts)
        found, start = {}, 0
        for name, each in weights.items():
            rows = slice(start, start + len(each))
            found[name] = assemble(codes[rows], scales[rows], None if fmt.symmetric else zeros[rows], fmt)
            start = rows.stop
        return found


def solve(
    weight: torch.Tensor,
    triangle: torch.Tensor,
    fmt: BlockFormat,
    missing: torch.Tensor | None = None,
) -> Solution:
    """Round ``weight`` so that the products with the calibration's inputs change least.

    With E the change of the weights, columns j of E R are made small one after the other: what the columns
    before have left there is what this one has to make up for. So the inverse of the Hessian is not needed,
    and no column is touched before it is due.

    Args:
        weight: float32 ``[N, K]``, which stays as it is.
        triangle: of the inputs' Hessian.
        fmt: how the result is stored.
        missing: see ``Means``, ``[N, K]``: what should be added to the products.

    Returns:
        uint8 codes ``[N, K]``, float32 scales and zero points ``[N, blocks]``, as ``assemble`` takes them.
    """
    import torch

    size = weight.shape[1]
    # [K, N]: one column of the matrix is one run of memory.
    left = weight.t().contiguous()
    due = None if missing is None else torch.linalg.solve_triangular(triangle, missing.t(), upper=True)
    changes = torch.empty_like(left)
    chunk, found = max(_CHUNK, fmt.block_size), []
    for first in range(0, size, chunk):
        part = slice(first, min(first + chunk, size))
        inside = triangle[part, part]
        inverse = torch.linalg.solve_triangular(inside, torch.eye(len(inside)), upper=True)
        owed = triangle[:first, part].t() @ changes[:first]
        if due is not None:
            owed += due[part]
        moved = torch.addmm(left[part], inverse.t(), owed)
        codes, scales, zeros = _solve_short(moved[None], inverse[None], fmt)
        found.append((codes[0], scales[0], zeros[0]))
        step, zero = (each[0].repeat_interleave(fmt.block_size, 0)[: len(inside)] for each in (scales, zeros))
        torch.sub(left[part], (codes[0] - zero).mul_(step), out=changes[part])
    codes, scales, zeros = (torch.cat(part).t().contiguous() for part in zip(*found, strict=True))
    return codes, scales, zeros


def solve_groups(weight: torch.Tensor, upper: torch.Tensor, fmt: BlockFormat) -> Solution:
    """The same where columns make up for the errors of their own group of a few hundred only.

    Args:
        weight: float32 ``[N, K]``, which stays as it is.
        upper: ``inverse_factor`` of each group's part of the Hessian, ``[groups, K / groups, K / groups]``.
        fmt: how the result is stored; its blocks do not reach over a group.

    Returns:
        uint8 codes ``[N, K]``, float32 scales and zero points ``[N, blocks]``, as ``assemble`` takes them.
    """
    import torch

    groups, size = upper.shape[:2]
    # [G, columns of a group, N]: one column of the matrix is one run of memory.
    # clone: where K or N is 1 the transpose is contiguous as it is, and it is written to below.
    left = weight.t().clone(memory_format=torch.contiguous_format).view(groups, size, -1)
    found = _solve_short(left, upper, fmt)
    codes, scales, zeros = (part.view(-1, len(weight)).t().contiguous() for part in found)
    return codes, scales, zeros


def solve_steps(steps: torch.Tensor, upper: torch.Tensor, largest: int) -> torch.Tensor:
    """``solve_groups`` of weights whose scales are fixed.

    Args:
        steps: the weights in units of their scales, turned: float32 ``[G, K / G, N]``; overwritten.
        upper: as there.
        largest: of a code's magnitude.

    Returns:
        int8 codes ``[G, K / G, N]``.
    """
    import torch

    groups, _, rows = steps.shape
    scales, zeros = torch.ones((groups, rows)), torch.zeros((groups, rows))
    fixed = _Range(scales, zeros, torch.tensor(float(-largest)), torch.tensor(float(largest)))
    codes = torch.empty(steps.shape, dtype=torch.int8)
    _round_columns(steps, upper, steps.shape[1], lambda *_: fixed, codes)
    return codes


def _solve_short(left: torch.Tensor, upper: torch.Tensor, fmt: BlockFormat) -> Solution:
    """``solve_groups`` of ``left`` [G, K, N], which is overwritten; results are turned likewise."""
    import torch

    top, (groups, size, rows) = (1 << fmt.bits) - 1, left.shape
    blocks = -(-size // fmt.block_size)
    codes = torch.empty((groups, size, rows), dtype=torch.uint8)
    scales, zeros = (torch.empty((groups, blocks, rows)) for _ in range(2))

    def search(block: int, values: torch.Tensor, importance: torch.Tensor) -> _Range:
        scale, zero, _ = search_steps(values, importance, fmt)
        scales[:, block], zeros[:, block] = scale, zero
        return _Range(scale, zero, -zero, top - zero)

    _round_columns(left, upper, fmt.block_size, search, codes)
    return codes, scales, zeros


def _round_columns(
    left: torch.Tensor,
    upper: torch.Tensor,
    block_size: int,
    search: Callable[[int, torch.Tensor, torch.Tensor], _Range],
    codes: torch.Tensor,
) -> None:
    """The columns of ``left`` [G, K, N], which is overwritten, become ``codes`` one after the other.

    ``search`` gives the range of a block by its number, its columns when they are due, and their importance.
    """
    import torch

    groups, size, rows = left.shape
    diagonal = upper.diagonal(dim1=1, dim2=2)
    importance, shares = diagonal.square().reciprocal(), upper / diagonal[:, :, None]
    for first in range(0, size, _RUNS):
        last = min(first + _RUNS, size)
        errors = torch.empty((groups, last - first, rows))
        for start in range(first, last, _RUN):
            block, stop = start // block_size, min(start + _RUN, last)
            if start % block_size == 0:  # its columns are up to date: blocks are multiples of runs
                inside = slice(start, min(start + block_size, size))
                found = search(block, left[:, inside], importance[:, inside])
                inverse = found.scale.reciprocal()
            levels = torch.empty((groups, stop - start, rows))
            for column in range(start, stop):
                values, level = left[:, column], levels[:, column - start]
                torch.mul(values, inverse, out=level).round_()
                torch.clamp(level, found.lowest, found.highest, out=level)
                error = errors[:, column - first]
                torch.addcmul(values, level, found.scale, value=-1, out=error)
                due = shares[:, column, column + 1 : stop, None]
                left[:, column + 1 : stop].addcmul_(due, error[:, None], value=-1)
            codes[:, start:stop] = levels.add_(found.zero[:, None])
            _spread(
                left[:, stop:last], shares[:, start:stop, stop:last], errors[:, start - first : stop - first]
            )
        _spread(left[:, last:], shares[:, first:last, last:], errors)


def _spread(left: torch.Tensor, shares: torch.Tensor, errors: torch.Tensor) -> None:
    """Columns to come ``[G, m, N]`` make up for ``errors`` [G, n, N] of others by ``shares`` [G, n, m]."""
    if left.shape[1]:
        left.baddbmm_(shares.transpose(1, 2), errors, alpha=-1)
