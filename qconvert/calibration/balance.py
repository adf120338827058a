"""One layer by the recipe awq: factors for its inputs, and its weights rounded for them.

All that it needs is given to it, so that another process can do it (``helper.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from qconvert.calibration.gptq.solve import DAMPING_OF_GROUPS, inverse_factor, solve_groups
from qconvert.calibration.steps import search_steps
from qconvert.calibration.work import Factors, Rounded, Seen
from qconvert.formats.blocks import assemble, pack
from qconvert.formats.folding import LARGEST_FACTOR, FoldedInput, Folding
from qconvert.formats.layout import NonFiniteWeightError, PackedWeight, is_finite
from qconvert.formats.recipe import BlockFormat

# Exponents of the input's sizes are tried with the first of the weights'; then, with the best, the others.
_INPUT_EXPONENTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
_WEIGHT_EXPONENTS = (0.7, 0.5, 0.3, 0.0)
# Rows of each matrix on which they are tried, and the share of a block's range.
_ROWS = 128
_SHARES = (0.9,)
# Weights of one column of every group that are rounded at a time. Each operation on them is short, so that
# fewer cost more a weight (7B's widths: 36 ns with a quarter of them, 23 with these; more gain little).
LANES = 1 << 16
_SMALLEST = 1e-20


@dataclass(frozen=True)
class LayerWork:
    """One layer to be rounded.

    Attributes:
        seen: what each of its inputs is like, first those that change what reads others.
        weights: of all readers by their names, of any type.
        formats: of the same.
        rounds_inputs: whether products round their inputs to 8 bits, so that factors have to suit these too.
    """

    seen: Mapping[FoldedInput, Seen]
    weights: Mapping[str, torch.Tensor]
    formats: Mapping[str, BlockFormat]
    rounds_inputs: bool = True

    def done(self) -> Rounded:
        """The factors of the layer's inputs and its rounded weights.

        Raises:
            NonFiniteWeightError: NaN or Inf in a weight.
        """
        factors = Factors()
        for found in self.seen:
            factors[found] = self._factors(found, Folding.of_inputs(factors))
        folding, rounded = Folding.of_inputs(factors), {}
        for found, seen in self.seen.items():
            columns = found.of_columns(factors[found])
            uppers = [upper_factors(run, part) for run, part in cut(seen.products, columns)]
            for name in found.readers:
                rounded[name] = self._round(name, folding, uppers)
        return factors, rounded

    def _factors(self, found: FoldedInput, folding: Folding) -> torch.Tensor:
        """The factors of one input whose error is least; in values of bfloat16, so that they are short."""
        fmt, seen = self.formats[found.readers[0]], self.seen[found]
        samples = [_some_rows(self.weights[name], name, folding) for name in found.readers]
        squares = seen.squares
        weight = torch.stack([rows.square().sum(0) * share for rows, share in samples]).sum(0)
        size, width = (found.of_rows(sums).clamp(min=_SMALLEST).sqrt().log() for sums in (squares, weight))
        trial = _Trial(samples, squares, seen.sample if self.rounds_inputs else None, fmt)

        def tried(pairs: Sequence[tuple[float, float]]) -> tuple[float, tuple[float, float]]:
            return min((trial.error(columns(pair)), pair) for pair in pairs)

        def columns(pair: tuple[float, float]) -> torch.Tensor:
            return found.of_columns(_geometric(pair[0] * size - pair[1] * width))

        first = tried([(exponent, _WEIGHT_EXPONENTS[0]) for exponent in _INPUT_EXPONENTS] + [(0.0, 0.0)])
        more = [(first[1][0], exponent) for exponent in _WEIGHT_EXPONENTS[1:]] if first[1][0] else []
        _, best = min([first, tried(more)]) if more else first
        return _geometric(best[0] * size - best[1] * width)

    def _round(self, name: str, folding: Folding, uppers: Sequence[torch.Tensor]) -> PackedWeight:
        """One matrix of the folded model; each of ``uppers`` is ``solve_groups``'s for one run of groups."""
        weight, fmt = self.weights[name], self.formats[name]
        step = max(64, LANES // sum(len(upper) for upper in uppers))
        pieces = [slice(start, start + step) for start in range(0, len(weight), step)]

        def rounded(rows: slice) -> PackedWeight:
            part = folding.apply(name, weight[rows].float(), rows.start)
            if not is_finite(part):
                raise NonFiniteWeightError(name)
            if fmt.bits == 8:
                return pack(part, fmt)
            runs = [solve_groups(columns, upper, fmt) for upper, columns in cut(uppers, part)]
            codes, scales, zeros = (
                torch.cat(side_by_side, dim=1) for side_by_side in zip(*runs, strict=True)
            )
            return assemble(codes, scales, None if fmt.symmetric else zeros, fmt)

        parts = [rounded(rows) for rows in pieces]
        zeros = [part.zero_points for part in parts if part.zero_points is not None]
        return PackedWeight(
            torch.cat([part.data for part in parts]),
            torch.cat([part.scales for part in parts]),
            torch.cat(zeros) if zeros else None,
        )


class _Trial:
    """One input and some rows of the matrices that read it, for trying factors."""

    def __init__(
        self,
        samples: Sequence[tuple[torch.Tensor, float]],
        squares: torch.Tensor,
        inputs: torch.Tensor | None,
        fmt: BlockFormat,
    ) -> None:
        self._squares, self._inputs, self._fmt = squares, inputs, fmt
        # [B, block, rows of all matrices]: a block is a column.
        self._rows = torch.cat([_blocks(rows, fmt).permute(1, 2, 0) for rows, _ in samples], 2)
        outputs = [float((rows.square() * squares).sum()) or 1.0 for rows, _ in samples]
        self._shares = torch.cat(
            [torch.full((len(rows),), 1 / all_) for (rows, _), all_ in zip(samples, outputs)]
        )

    def error(self, factors: torch.Tensor) -> float:
        """The square error of the products in all, each relative to its matrix's outputs."""
        fmt, importance = self._fmt, _blocks(self._squares / factors.square(), self._fmt)
        balanced = self._rows * _blocks(factors, fmt)[:, :, None]
        _, _, errors = search_steps(balanced, importance, fmt, _SHARES)
        error = errors.sum(0)
        if self._inputs is not None:
            steps = _blocks(self._inputs / factors, fmt).abs().amax(-1) / 127
            noise = steps.square().mean(0) / 12  # of activations rounded with such steps
            error += noise @ balanced.square_().sum(1)
        return float(error @ self._shares)


def _some_rows(weight: torch.Tensor, name: str, folding: Folding) -> tuple[torch.Tensor, float]:
    """Rows of the folded matrix, spread over it, float32; and how many each of them stands for."""
    step = max(1, len(weight) // _ROWS)
    rows = weight[::step].float()
    if not is_finite(rows):
        raise NonFiniteWeightError(name)
    if name in folding.multiplied:
        rows = rows * folding.multiplied[name]
    if name in folding.divided:
        rows = rows / folding.divided[name][::step, None]
    return rows, len(weight) / len(rows)


def _geometric(logarithms: torch.Tensor) -> torch.Tensor:
    """Factors of a geometric mean of 1, in values that bfloat16 holds."""
    factors = (logarithms - logarithms.mean()).exp().clamp_(1 / LARGEST_FACTOR, LARGEST_FACTOR)
    return factors.bfloat16().float()


def _blocks(values: torch.Tensor, fmt: BlockFormat) -> torch.Tensor:
    """Columns ``[.., K]`` as blocks ``[.., B, block]``, the last one filled up with zeros."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[-1] % fmt.block_size))
    return padded.view(*values.shape[:-1], -1, fmt.block_size)


def upper_factors(
    products: torch.Tensor, factors: torch.Tensor, damping: float = DAMPING_OF_GROUPS
) -> torch.Tensor:
    """``solve_groups``'s factors for the balanced inputs of one run of groups, ``[groups, size, size]``."""
    part = factors.view(products.shape[0], -1)
    balanced = products / part[:, :, None] / part[:, None, :]
    return torch.stack([inverse_factor(group, damping) for group in balanced])


def cut(runs: Sequence[torch.Tensor], columns: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each run of groups, ``[groups, size, size]``, with its own of the columns ``[.., K]``."""
    start = 0
    for run in runs:
        stop = start + run.shape[0] * run.shape[1]
        yield run, columns[..., start:stop]
        start = stop
