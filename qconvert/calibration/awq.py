"""The recipe awq for 4 bits: the input of every product is balanced, then weights are rounded in groups.

For the input of each product one factor per channel, f = x^a / w^b with x the root of its mean square and w
that of the weights that read it, moves unevenness between input and weights (``formats/folding.py``). a and b
are those with the least error: of weights rounded block by block, weighted with the input's mean squares, and
of activations, which ONNX Runtime's product rounds to 8 bits with one scale a block (TensorRT's does not).
Then the columns of a group make up for one another's errors (``gptq/solve.py``), on the products of inputs
inside the group. One pass of a text through the true decoder gives all that is asked of the inputs.

Sources: Lin et al., AWQ, arXiv:2306.00978; Frantar et al., GPTQ, arXiv:2210.17323.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from qconvert.calibration.balance import LayerWork
from qconvert.calibration.gptq.rounding import not_finite
from qconvert.calibration.gptq.store import HEAD, RoundedWeights
from qconvert.calibration.helper import Helper
from qconvert.calibration.statistics import Watcher
from qconvert.calibration.walk import Walk
from qconvert.calibration.work import Factors, Seen
from qconvert.formats.folding import FoldedInput
from qconvert.formats.layout import NonFiniteWeightError
from qconvert.formats.recipe import BlockFormat, Recipe
from qconvert.progress import Progress
from qrun.machine import usable_cores

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# Columns that make up for one another's errors: whole blocks of about this many.
GROUP = 256
# Another process takes two seconds to start: what about this many weights take to be rounded.
_WORTH_A_PROCESS = 50_000_000
_MOST_PROCESSES = 7


def balance_and_round(
    model: PreTrainedModel,
    recipe: Recipe,
    sequences: Sequence[Sequence[int]],
    store: RoundedWeights,
    *,
    progress: Progress,
    watcher: Watcher | None = None,
    helpers: Sequence[Helper] = (),
) -> Factors:
    """Round every linear weight of the decoder into ``store``; the factors that were folded into them before.

    What an interrupted export has left is made again: nothing of it is kept.

    Args:
        model: the checkpoint, of any type; nothing of it is changed.
        recipe: with a format for every linear weight.
        sequences: token ids, all of one length.
        store: gets each layer as soon as it is rounded.
        progress: is told of each layer.
        watcher: looks at every layer of the text too.
        helpers: processes beside this one (see ``helpers_worth``), which are ended here. The result is the
            same to the bit.

    Raises:
        QconvertError: a weight holds NaN or Inf.
    """
    store.remove()
    walk = Walk(model, Balancing(recipe), sequences, watcher)
    factors = Factors()
    with progress.task("balancing and rounding the weights", walk.layers) as advance:
        try:
            with closing(walk.rounded(helpers)) as layers:
                for index, (found, rounded) in enumerate(layers):
                    store.add_layer(index, rounded)
                    factors |= found
                    advance(1)
            if recipe.shortlist is not None:
                store.add_layer(HEAD, walk.head(recipe))
        except NonFiniteWeightError as error:
            raise not_finite(error) from error
    return factors


def helpers_worth(parameters: int) -> int:
    """Processes beside this one that a model of this size is worth: one for each further core, or none."""
    return min(usable_cores() - 1, _MOST_PROCESSES) if parameters >= _WORTH_A_PROCESS else 0


class Balancing:
    """``walk.Plan`` of a recipe that has a format for every linear weight."""

    rounds_long = True

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe

    def group(self, name: str, columns: int) -> int:
        """Whole blocks of about ``GROUP``."""
        return group_of(columns, self._format(name))

    def work(self, seen: Mapping[FoldedInput, Seen], weights: Mapping[str, torch.Tensor]) -> LayerWork:
        """See ``walk.Plan``."""
        formats = {name: self._format(name) for name in weights}
        return LayerWork(seen, weights, formats, self._recipe.activations == "float32")

    def _format(self, name: str) -> BlockFormat:
        fmt = self._recipe.format_of(name)
        assert fmt is not None, "a recipe that calibrates packs every linear weight"
        return fmt


def group_of(columns: int, fmt: BlockFormat) -> int:
    """Columns that make up for one another's errors: whole blocks, as many as divide the matrix if any do."""
    sizes = range(fmt.block_size, max(GROUP, fmt.block_size) + 1, fmt.block_size)
    fitting = [size for size in sizes if columns % size == 0]
    return min(columns, fitting[-1] if fitting else sizes[-1])
