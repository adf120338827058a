"""Weights of integer products, rounded so that the columns of a group make up for one another's errors.

Scales are those of rounding to nearest, max|w| / 127 of each output channel, and of each group of down_proj's
inputs; only codes differ from it, mostly by one. On the sample the layers' weights then cost int8 a mean KL
of 0.0026 in place of 0.0033. No byte is added, and products are the same. Columns are solved as in GPTQ
(Frantar et al., arXiv:2210.17323), after the factors of ``smoothing.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qconvert.calibration.balance import LANES, cut, upper_factors
from qconvert.calibration.gptq.rounding import not_finite
from qconvert.calibration.gptq.solve import DAMPING, solve_steps
from qconvert.calibration.gptq.store import RoundedWeights
from qconvert.calibration.observer import Observer
from qconvert.calibration.smoothing import factors_for, factors_of_input
from qconvert.calibration.walk import Walk
from qconvert.calibration.work import Factors, Rounded, Seen
from qconvert.formats.channels import LARGEST, Channels, InputChannels, channel_groups, channel_layout
from qconvert.formats.folding import FoldedInput, Folding
from qconvert.formats.layout import NonFiniteWeightError, PackedWeight, is_finite
from qconvert.formats.recipe import ChannelFormat
from qconvert.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Columns that make up for one another's errors: at most, and at least.
_MOST, _LEAST = 384, 16


def compensate_and_round(
    model: PreTrainedModel,
    fmt: ChannelFormat,
    sequences: Sequence[Sequence[int]],
    store: RoundedWeights,
    *,
    observer: Observer,
    progress: Progress,
) -> Factors:
    """Round every linear weight of the decoder into ``store``; the factors that were folded into them before.

    What an interrupted export has left is made again: nothing of it is kept.

    Args:
        model: the checkpoint, of any type; nothing of it is changed.
        fmt: of the weights.
        sequences: token ids, all of one length.
        store: gets each layer as soon as it is rounded.
        observer: has to see the sizes of the inputs that ``fmt`` folds.
        progress: is told of each layer.

    Raises:
        QconvertError: a weight holds NaN or Inf.
    """
    store.remove()
    walk = Walk(model, Compensating(fmt, model.config.intermediate_size, observer), sequences, observer)
    factors = Factors()
    with progress.task("smoothing and rounding the weights", walk.layers) as advance:
        try:
            with closing(walk.rounded()) as layers:
                for index, (found, rounded) in enumerate(layers):
                    store.add_layer(index, rounded)
                    factors |= found
                    advance(1)
        except NonFiniteWeightError as error:
            raise not_finite(error) from error
    return factors


class Compensating:
    """``walk.Plan`` of integer products.

    Args:
        fmt: of the weights.
        channels: of the MLP between.
        observer: of the walk.
    """

    rounds_long = False

    def __init__(self, fmt: ChannelFormat, channels: int, observer: Observer) -> None:
        self._fmt, self._channels, self._observer = fmt, channels, observer

    def group(self, name: str, columns: int) -> int:
        """No group reaches over columns with scales of their own."""
        return group_of(_cuts(self._layout(name), columns)[0].stop)

    def work(self, seen: Mapping[FoldedInput, Seen], weights: Mapping[str, torch.Tensor]) -> ChannelWork:
        """See ``walk.Plan``."""
        sizes = {found: self._observer.sizes[found].size for found in seen if found in self._observer.sizes}
        layouts = {name: self._layout(name) for name in weights}
        return ChannelWork(seen, sizes, weights, layouts, self._fmt.smoothing)

    def _layout(self, name: str) -> Channels | InputChannels:
        return channel_layout(name, self._channels, self._fmt)


@dataclass(frozen=True)
class ChannelWork:
    """One layer to be rounded.

    Attributes:
        seen: what each of its inputs is like.
        sizes: of the columns of those that are folded, as ``observer.ColumnSizes`` finds them.
        weights: of all readers by their names, of any type.
        layouts: of the same.
        smoothing: how much goes from inputs into weights; None: nothing.
    """

    seen: Mapping[FoldedInput, Seen]
    sizes: Mapping[FoldedInput, torch.Tensor]
    weights: Mapping[str, torch.Tensor]
    layouts: Mapping[str, Channels | InputChannels]
    smoothing: float | None

    def done(self) -> Rounded:
        """See ``work.Work``."""
        factors = Factors()
        for found, seen in self.seen.items() if self.smoothing is not None else ():
            factors[found] = self._factors(found, seen, Folding.of_inputs(factors))
        folding, rounded = Folding.of_inputs(factors), {}
        for found, seen in self.seen.items():
            columns = found.of_columns(factors[found]) if factors else torch.ones(len(seen.squares))
            uppers = [upper_factors(run, part, DAMPING) for run, part in cut(seen.products, columns)]
            for name in found.readers:
                rounded[name] = self._round(name, folding, uppers)
        return factors, rounded

    def _factors(self, found: FoldedInput, seen: Seen, folding: Folding) -> torch.Tensor:
        """Of one input, whose readers are folded by ``folding`` already."""
        assert self.smoothing is not None
        readers = [folding.apply(name, self.weights[name]) for name in found.readers]
        if not found.of_values:
            return factors_of_input(self.sizes[found], readers, self.smoothing)
        # Of values a record is kept, since they are in the KV cache: short factors.
        size, weight = (
            found.of_rows(sums).sqrt() for sums in (seen.squares, readers[0].float().square().sum(0))
        )
        return factors_for(size, weight, self.smoothing).bfloat16().float()

    def _round(self, name: str, folding: Folding, uppers: Sequence[torch.Tensor]) -> PackedWeight:
        """One matrix of the folded model, with what ``upper_factors`` gives for each run of groups."""
        weight, layout = self.weights[name], self.layouts[name]
        rows, columns = weight.shape
        cuts = _cuts(layout, columns)
        data, scales = torch.empty((columns, rows), dtype=torch.int8), torch.empty(len(cuts), rows)
        for part in _pieces(rows, sum(map(len, uppers))):
            values = folding.apply(name, weight[part].float(), part.start).t().contiguous()
            for place, inputs in enumerate(cuts):
                steps = values[inputs].abs().amax(0) / LARGEST
                if not is_finite(steps):
                    raise NonFiniteWeightError(name)
                steps.masked_fill_(steps == 0, 1.0)  # a channel of zeros: any scale but 0 stores it exactly
                values[inputs] /= steps
                scales[place, part] = steps
            start = 0
            for upper in uppers:
                stop = start + upper.shape[0] * upper.shape[1]
                run = values[start:stop].view(*upper.shape[:2], -1)
                data[start:stop, part] = solve_steps(run, upper, LARGEST).flatten(0, 1)
                start = stop
        return PackedWeight(data, scales if isinstance(layout, InputChannels) else scales[0])


def group_of(columns: int) -> int:
    """Columns that make up for one another's errors, of those that have scales in common.

    It is a divisor, since groups must not reach over cuts, which are multiples of 16; a whole input that has
    none may leave a rest.
    """
    divisor = max(size for size in range(1, min(columns, _MOST) + 1) if columns % size == 0)
    return divisor if divisor >= _LEAST else min(columns, _MOST)


def _cuts(layout: Channels | InputChannels, columns: int) -> list[slice]:
    """Columns with scales of their own."""
    return channel_groups(columns, layout.cuts) if isinstance(layout, InputChannels) else [slice(0, columns)]


def _pieces(rows: int, groups: int) -> Iterator[slice]:
    step = max(64, LANES // groups)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
