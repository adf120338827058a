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

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from queue import SimpleQueue
from threading import Event, Semaphore
from typing import TYPE_CHECKING

import torch

from qconvert.calibration.balance import Factors, LayerWork
from qconvert.calibration.coarse import head_in_halves
from qconvert.calibration.gptq.rounding import not_finite
from qconvert.calibration.gptq.store import HEAD, RoundedWeights
from qconvert.calibration.helper import Helper
from qconvert.calibration.statistics import InputStatistics, Pass, Watcher
from qconvert.checkpoint.weights import CheckpointWeights
from qconvert.formats.folding import FoldedInput, folded_inputs, value_input
from qconvert.formats.layout import NonFiniteWeightError, PackedWeight
from qconvert.formats.recipe import BlockFormat, Recipe
from qconvert.models.families import spec_of
from qconvert.parallel import all_threads, piece_workers, single_threads
from qconvert.progress import Progress
from qrun.machine import usable_cores

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Columns that make up for one another's errors: whole blocks of about this many.
GROUP = 256
# Another process takes two seconds to start: what this many weights take to be rounded.
_WORTH_A_PROCESS = 50_000_000
_MOST_PROCESSES = 7

Rounded = tuple[Factors, dict[str, PackedWeight]]
Engine = Callable[[LayerWork], Rounded]


def balance_and_round(
    model: PreTrainedModel,
    recipe: Recipe,
    sequences: Sequence[Sequence[int]],
    store: RoundedWeights,
    *,
    progress: Progress,
    watcher: Watcher | None = None,
    helpers: int | None = None,
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
        helpers: processes beside this one; None: one for each further core, where the model is worth it.
            The result is the same to the bit.

    Raises:
        QconvertError: a weight holds NaN or Inf.
    """
    store.remove()
    walk = Walk(model, recipe, sequences, watcher)
    factors = Factors()
    if helpers is None:
        helpers = min(usable_cores() - 1, _MOST_PROCESSES) if walk.weights >= _WORTH_A_PROCESS else 0
    with progress.task("balancing and rounding the weights", walk.layers) as advance:
        try:
            with closing(walk.rounded(helpers)) as layers:
                for index, (found, rounded) in enumerate(layers):
                    store.add_layer(index, rounded)
                    factors |= found
                    advance(1)
            if recipe.shortlist is not None:
                store.add_layer(HEAD, walk.head())
        except NonFiniteWeightError as error:
            raise not_finite(error) from error
    return factors


class Walk:
    """The walk through the decoder.

    One thread reads the text, layer by layer, with the true weights; what it sees of a layer is all that its
    rounding needs. Rounding is many short operations, which threads of one interpreter cannot share (each
    would wait for the others longer than it works): one thread of this process rounds, and every helper is a
    process of its own.

    Memory: ``Pass``, and for each of those who round two layers' statistics and one layer's weights.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        recipe: Recipe,
        sequences: Sequence[Sequence[int]],
        watcher: Watcher | None = None,
    ) -> None:
        self._config, self._spec = model.config, spec_of(model.config)
        self._weights = CheckpointWeights(model)
        self._recipe = recipe
        self._pass = Pass(model, sequences, watcher)
        self.layers = self._spec.num_hidden_layers

    @property
    def weights(self) -> int:
        """How many there are to be rounded."""
        names = [name for found in self._inputs(0) for name in found.readers]
        rows_and_columns = [self._weights.shape(name) for name in names]
        return self.layers * sum(rows * columns for rows, columns in rows_and_columns)

    def rounded(self, helpers: int) -> Generator[Rounded, None, None]:
        """Each layer, in order.

        Raises:
            NonFiniteWeightError: NaN or Inf in a weight, or in what the layers before make of it.
        """
        with ExitStack() as processes, single_threads():
            others = [processes.enter_context(Helper()) for _ in range(helpers)]
            engines = self._engines(others)
            idle: SimpleQueue[Engine] = SimpleQueue()
            for engine in engines:
                idle.put(engine)
            # Whoever reads the text is ahead by one layer for each of those who round.
            ahead, stopped = Semaphore(len(engines)), Event()

            def look(index: int) -> LayerWork:
                ahead.acquire()
                if stopped.is_set():
                    raise InterruptedError
                return self._look(index, but=len(engines))

            def layer(index: int) -> Rounded:
                work, engine = looks.pop(index).result(), idle.get()
                try:
                    return engine(work)
                finally:
                    idle.put(engine)
                    for name in work.weights:
                        self._weights.release(name)
                    ahead.release()

            with _threads(1) as reader, _threads(len(engines)) as rounders:
                # Each is taken out when it is needed: what it holds must not stay until the last is done.
                looks = {index: reader.submit(look, index) for index in range(self.layers)}
                layers = deque(rounders.submit(layer, index) for index in range(self.layers))
                try:
                    while layers:  # in order, so that the first layer which fails is the one that is named
                        yield layers.popleft().result()
                finally:
                    stopped.set()
                    for helper in others:
                        helper.stop()
                    for future in layers:
                        future.cancel()
                    for unseen in list(looks.values()):
                        unseen.cancel()
                    ahead.release(self.layers)

    @staticmethod
    def _engines(others: Sequence[Helper]) -> list[Engine]:
        return [LayerWork.done, *(helper.done for helper in others)]

    def _inputs(self, index: int) -> tuple[FoldedInput, ...]:
        norms_and_mlp = folded_inputs(index)
        values = value_input(index, self._spec.num_attention_heads, self._spec.num_key_value_heads)
        # up_proj and v_proj are divided first: what reads a norm is balanced as it will be rounded.
        return norms_and_mlp[2], values, *norms_and_mlp[:2]

    def head(self) -> dict[str, PackedWeight]:
        """The head in halves, after the last layer.

        Raises:
            NonFiniteWeightError: NaN or Inf in it or in the norm before.
        """
        columns = self._spec.hidden_size
        seen = InputStatistics(columns, columns, self._pass.tokens)
        with all_threads():
            self._pass.final(seen.add)
        with piece_workers() as workers:
            return head_in_halves(self._weights, self._config, self._recipe, seen.products[0][0], workers)

    def _look(self, index: int, but: int) -> LayerWork:
        """What the inputs of one layer are like; ``but``: threads that are left to others."""
        inputs, prefix, seen, looks = self._inputs(index), f"model.layers.{index}.", {}, {}
        for found in inputs:
            name = found.readers[0]
            columns = self._weights.shape(name)[1]
            seen[found] = InputStatistics(columns, group_of(columns, self._format(name)), self._pass.tokens)
            looks[name.removeprefix(prefix).removesuffix(".weight")] = seen[found].add
        with all_threads(but=but):
            self._pass.layer(index, looks)
        names = [name for found in inputs for name in found.readers]
        bad = [found for found in inputs if not bool(torch.isfinite(seen[found].squares).all())]
        if bad:  # the cause is a weight of this layer, or else something before its first product
            guilty = (name for name in names if not bool(torch.isfinite(self._weights[name]).all()))
            raise NonFiniteWeightError(next(guilty, bad[-1].readers[0]))
        weights = {name: self._weights[name] for name in names}
        formats = {name: self._format(name) for name in names}
        return LayerWork(seen, weights, formats, self._recipe.activations == "float32")

    def _format(self, name: str) -> BlockFormat:
        fmt = self._recipe.format_of(name)
        assert fmt is not None, "a recipe that calibrates packs every linear weight"
        return fmt


@contextmanager
def _threads(count: int) -> Iterator[Executor]:
    """Threads in which torch is single-threaded, unless in ``all_threads``."""
    with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield pool


def group_of(columns: int, fmt: BlockFormat) -> int:
    """Columns that make up for one another's errors: whole blocks, as many as divide the matrix if any do."""
    sizes = range(fmt.block_size, max(GROUP, fmt.block_size) + 1, fmt.block_size)
    fitting = [size for size in sizes if columns % size == 0]
    return min(columns, fitting[-1] if fitting else sizes[-1])
