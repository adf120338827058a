"""The recipe awq for 4 bits: the input of every product is balanced, then weights are rounded in groups.

For the input of each product one factor per channel, f = x^a / w^b with x the root of its mean square and w
that of the weights that read it, moves unevenness between input and weights (``formats/folding.py``). a and b
are those with the least error: of weights rounded block by block, weighted with the input's mean squares, and
of activations, which ONNX Runtime's product rounds to 8 bits with one scale a block. Then the columns of a
group make up for one another's errors (``gptq/solve.py``), on the products of the inputs inside the group.
One pass of a text through the true decoder gives all that is asked of the inputs.

Sources: Lin et al., AWQ, arXiv:2306.00978; Frantar et al., GPTQ, arXiv:2210.17323.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from typing import TYPE_CHECKING

import torch

from qconvert.calibration.gptq.rounding import not_finite
from qconvert.calibration.gptq.solve import inverse_factor, solve_groups
from qconvert.calibration.gptq.store import RoundedWeights
from qconvert.calibration.statistics import InputStatistics, Pass
from qconvert.calibration.steps import search_steps
from qconvert.checkpoint.weights import CheckpointWeights
from qconvert.formats.blocks import assemble, pack
from qconvert.formats.folding import LARGEST_FACTOR, FoldedInput, Folding, folded_inputs, value_input
from qconvert.formats.layout import NonFiniteWeightError, PackedWeight
from qconvert.formats.recipe import BlockFormat, Recipe
from qconvert.models.families import spec_of
from qconvert.parallel import all_threads, one_beside
from qconvert.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Exponents of the input's sizes are tried with the first of the weights'; then, with the best, the others.
_INPUT_EXPONENTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
_WEIGHT_EXPONENTS = (0.7, 0.5, 0.3, 0.0)
# Rows of each matrix on which they are tried, and the share of a block's range.
_ROWS = 128
_SHARES = (0.9,)
# Columns that make up for one another's errors: whole blocks of about this many.
GROUP = 256
# Weights of one column of every group that are rounded at a time: what is at work stays in the cache.
_LANES = 1 << 14
_SMALLEST = 1e-20

Factors = dict[FoldedInput, torch.Tensor]


def balance_and_round(
    model: PreTrainedModel,
    recipe: Recipe,
    sequences: Sequence[Sequence[int]],
    store: RoundedWeights,
    progress: Progress,
) -> Factors:
    """Round every linear weight of the decoder into ``store``; the factors that were folded into them before.

    What an interrupted export has left is made again: nothing of it is kept.

    Raises:
        QconvertError: a weight holds NaN or Inf.
    """
    store.remove()
    factors: Factors = {}
    layers = model.config.num_hidden_layers
    with one_beside() as beside, progress.task("balancing and rounding the weights", layers) as advance:
        balance = Balance(model, recipe, sequences, beside)
        for index in range(layers):
            try:
                found, rounded = balance.layer(index)
            except NonFiniteWeightError as error:
                raise not_finite(error) from error
            factors |= found
            store.add_layer(index, rounded)
            advance(1)
    return factors


class Balance:
    """The walk through the decoder. Memory: ``Pass`` and the statistics of two layers.

    Rounding is many short operations, which threads of one interpreter cannot share: each would wait for
    the others longer than it works. So one thread rounds, and another reads the text with the next layer.

    Args:
        model: the checkpoint, of any type; nothing of it is changed.
        recipe: with a format for every linear weight.
        sequences: token ids, all of one length.
        beside: the other thread (see ``parallel.one_beside``).
    """

    def __init__(
        self, model: PreTrainedModel, recipe: Recipe, sequences: Sequence[Sequence[int]], beside: Executor
    ) -> None:
        self._spec = spec_of(model.config)
        self._weights = CheckpointWeights(model)
        self._recipe, self._beside = recipe, beside
        self._pass = Pass(model, sequences)
        self._ahead = beside.submit(self._look, 0)

    def layer(self, index: int) -> tuple[Factors, dict[str, PackedWeight]]:
        """The factors of one layer's inputs and its rounded weights. Layers are to be asked for in order.

        Raises:
            NonFiniteWeightError: NaN or Inf in a weight, or in what the layers before make of it.
        """
        seen, factors = self._ahead.result(), Factors()
        if index + 1 < self._spec.num_hidden_layers:
            self._ahead = self._beside.submit(self._look, index + 1)
        for found in seen:
            factors[found] = self._factors(found, seen[found], Folding.of_inputs(factors))
        folding = Folding.of_inputs(factors)
        rounded = {}
        for found in seen:
            columns = found.of_columns(factors[found])
            uppers = [_upper_factors(run, part) for run, part in _cut(seen[found].products, columns)]
            for name in found.readers:
                rounded[name] = self._round(name, folding, uppers)
        for name in rounded:
            self._weights.release(name)
        return factors, rounded

    @property
    def _heads(self) -> tuple[int, int]:
        return self._spec.num_attention_heads, self._spec.num_key_value_heads

    def _look(self, index: int) -> Mapping[FoldedInput, InputStatistics]:
        """What the inputs of one layer are like, first those that change what reads others."""
        norms_and_mlp, values = folded_inputs(index), value_input(index, *self._heads)
        # up_proj and v_proj are divided first: what reads a norm is balanced as it will be rounded.
        inputs = (norms_and_mlp[2], values, *norms_and_mlp[:2])
        prefix, seen, looks = f"model.layers.{index}.", {}, {}
        for found in inputs:
            name = found.readers[0]
            columns = self._weights[name].shape[1]
            seen[found] = InputStatistics(columns, group_of(columns, self._format(name)), self._pass.tokens)
            looks[name.removeprefix(prefix).removesuffix(".weight")] = seen[found].add
        with all_threads(but=1):
            self._pass.layer(index, looks)
        bad = [found for found in inputs if not bool(torch.isfinite(seen[found].squares).all())]
        if bad:  # the cause is a weight of this layer, or else something before its first product
            names = [name for found in inputs for name in found.readers]
            guilty = (name for name in names if not bool(torch.isfinite(self._weights[name]).all()))
            raise NonFiniteWeightError(next(guilty, bad[-1].readers[0]))
        return seen

    def _factors(self, found: FoldedInput, seen: InputStatistics, folding: Folding) -> torch.Tensor:
        """The factors of one input whose error is least; in values of bfloat16, so that they are short."""
        fmt = self._format(found.readers[0])
        samples = [_some_rows(self._weights[name], name, folding) for name in found.readers]
        squares = seen.squares
        weight = torch.stack([rows.square().sum(0) * share for rows, share in samples]).sum(0)
        size, width = (_of_rows(found, sums).clamp(min=_SMALLEST).sqrt().log() for sums in (squares, weight))
        trial = _Trial(samples, squares, seen.sample, fmt)

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
        weight, fmt = self._weights[name], self._format(name)
        step = max(64, _LANES // sum(len(upper) for upper in uppers))
        pieces = [slice(start, start + step) for start in range(0, len(weight), step)]

        def rounded(rows: slice) -> PackedWeight:
            part = folding.apply(name, weight[rows].float(), rows.start)
            if not bool(torch.isfinite(part).all()):
                raise NonFiniteWeightError(name)
            if fmt.bits == 8:
                return pack(part, fmt)
            runs = [solve_groups(columns, upper, fmt) for upper, columns in _cut(uppers, part)]
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

    def _format(self, name: str) -> BlockFormat:
        fmt = self._recipe.format_of(name)
        assert fmt is not None, "a recipe that calibrates packs every linear weight"
        return fmt


class _Trial:
    """One input and some rows of the matrices that read it, for trying factors."""

    def __init__(
        self,
        samples: Sequence[tuple[torch.Tensor, float]],
        squares: torch.Tensor,
        inputs: torch.Tensor,
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
        steps = _blocks(self._inputs / factors, fmt).abs().amax(-1) / 127
        noise = steps.square().mean(0) / 12  # of activations rounded with such steps
        balanced = self._rows * _blocks(factors, fmt)[:, :, None]
        _, _, errors = search_steps(balanced, importance, fmt, _SHARES)
        activations = noise @ balanced.square_().sum(1)
        return float((errors.sum(0) + activations) @ self._shares)


def group_of(columns: int, fmt: BlockFormat) -> int:
    """Columns that make up for one another's errors: whole blocks, as many as divide the matrix if any do."""
    sizes = range(fmt.block_size, max(GROUP, fmt.block_size) + 1, fmt.block_size)
    fitting = [size for size in sizes if columns % size == 0]
    return min(columns, fitting[-1] if fitting else sizes[-1])


def _some_rows(weight: torch.Tensor, name: str, folding: Folding) -> tuple[torch.Tensor, float]:
    """Rows of the folded matrix, spread over it, float32; and how many each of them stands for."""
    step = max(1, len(weight) // _ROWS)
    rows = weight[::step].float()
    if not bool(torch.isfinite(rows).all()):
        raise NonFiniteWeightError(name)
    if name in folding.multiplied:
        rows = rows * folding.multiplied[name]
    if name in folding.divided:
        rows = rows / folding.divided[name][::step, None]
    return rows, len(weight) / len(rows)


def _of_rows(found: FoldedInput, sums: torch.Tensor) -> torch.Tensor:
    """Sums of squares of columns as those of the divided rows: value heads have the mean of their queries."""
    return sums.view(found.heads, found.queries, -1).mean(1).flatten() if found.queries > 1 else sums


def _geometric(logarithms: torch.Tensor) -> torch.Tensor:
    """Factors of a geometric mean of 1, in values that bfloat16 holds."""
    factors = (logarithms - logarithms.mean()).exp().clamp_(1 / LARGEST_FACTOR, LARGEST_FACTOR)
    return factors.bfloat16().float()


def _blocks(values: torch.Tensor, fmt: BlockFormat) -> torch.Tensor:
    """Columns ``[.., K]`` as blocks ``[.., B, block]``, the last one filled up with zeros."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[-1] % fmt.block_size))
    return padded.view(*values.shape[:-1], -1, fmt.block_size)


def _upper_factors(products: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """``solve_groups``'s factors for the balanced inputs of one run of groups, ``[groups, size, size]``."""
    part = factors.view(products.shape[0], -1)
    balanced = products / part[:, :, None] / part[:, None, :]
    return torch.stack([inverse_factor(group) for group in balanced])


def _cut(runs: Sequence[torch.Tensor], columns: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each run of groups, ``[groups, size, size]``, with its own of the columns ``[.., K]``."""
    start = 0
    for run in runs:
        stop = start + run.shape[0] * run.shape[1]
        yield run, columns[..., start:stop]
        start = stop
