"""The walk through the decoder in which each layer is rounded for the inputs that a text gives it.

The layers before are the true ones: what a layer is to be rounded for does not wait for their rounding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from queue import SimpleQueue
from threading import Event, Semaphore
from typing import TYPE_CHECKING

import torch

from qconvert.calibration.coarse import head_in_halves
from qconvert.calibration.helper import Helper
from qconvert.calibration.statistics import InputStatistics, Pass, Watcher
from qconvert.calibration.work import Plan, Rounded, Work
from qconvert.checkpoint.weights import CheckpointWeights
from qconvert.formats.folding import FoldedInput, decoder_inputs
from qconvert.formats.layout import NonFiniteWeightError, PackedWeight, is_finite
from qconvert.formats.recipe import Recipe
from qconvert.models.families import spec_of
from qconvert.parallel import all_threads, piece_workers, single_threads

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Engine = Callable[[Work], Rounded]


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
        plan: Plan,
        sequences: Sequence[Sequence[int]],
        watcher: Watcher | None = None,
    ) -> None:
        self._config, self._spec = model.config, spec_of(model.config)
        self._weights = CheckpointWeights(model)
        self._plan = plan
        self._pass = Pass(model, sequences, watcher)
        self.layers = self._spec.num_hidden_layers

    def rounded(self, helpers: Sequence[Helper] = ()) -> Generator[Rounded, None, None]:
        """Each layer, in order.

        Args:
            helpers: processes beside this one, which are ended here; only the recipe awq's work can be given
                to them.

        Raises:
            NonFiniteWeightError: NaN or Inf in a weight, or in what the layers before make of it.
        """
        with ExitStack() as processes, single_threads():
            for helper in helpers:
                processes.callback(helper.end)
            engines = engines_of(helpers)
            idle: SimpleQueue[Engine] = SimpleQueue()
            for engine in engines:
                idle.put(engine)
            # Whoever reads the text is ahead by one layer for each of those who round.
            ahead, stopped = Semaphore(len(engines)), Event()

            def look(index: int) -> Work:
                ahead.acquire()
                if stopped.is_set():
                    raise InterruptedError
                return self._look(index, but=len(engines) if self._plan.rounds_long else 0)

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
                    for helper in helpers:
                        helper.stop()
                    for future in layers:
                        future.cancel()
                    for unseen in list(looks.values()):
                        unseen.cancel()
                    ahead.release(self.layers)

    def _inputs(self, index: int) -> tuple[FoldedInput, ...]:
        return decoder_inputs(index, self._spec.num_attention_heads, self._spec.num_key_value_heads)

    def head(self, recipe: Recipe) -> dict[str, PackedWeight]:
        """The recipe's head in halves, after the last layer.

        Raises:
            NonFiniteWeightError: NaN or Inf in it or in the norm before.
        """
        columns = self._spec.hidden_size
        seen = InputStatistics(columns, columns, self._pass.tokens)
        with all_threads():
            self._pass.final(seen.add)
        with piece_workers() as workers:
            return head_in_halves(self._weights, self._config, recipe, seen.products[0][0], workers)

    def _look(self, index: int, but: int) -> Work:
        """What the inputs of one layer are like; ``but``: threads that are left to others."""
        inputs, prefix, seen, looks = self._inputs(index), f"model.layers.{index}.", {}, {}
        for found in inputs:
            name = found.readers[0]
            columns = self._weights.shape(name)[1]
            seen[found] = InputStatistics(columns, self._plan.group(name, columns), self._pass.tokens)
            looks[name.removeprefix(prefix).removesuffix(".weight")] = seen[found].add
        with all_threads(but=but):
            self._pass.layer(index, looks)
        names = [name for found in inputs for name in found.readers]
        bad = [found for found in inputs if not is_finite(seen[found].squares)]
        if bad:  # the cause is a weight of this layer, or else something before its first product
            guilty = (name for name in names if not is_finite(self._weights[name]))
            raise NonFiniteWeightError(next(guilty, bad[-1].readers[0]))
        weights = {name: self._weights[name] for name in names}
        return self._plan.work(seen, weights)


@contextmanager
def _threads(count: int) -> Iterator[Executor]:
    """Threads in which torch is single-threaded, unless in ``all_threads``."""
    with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield pool


def engines_of(others: Sequence[Helper]) -> list[Engine]:
    """All who round: this process, and each of the others."""
    here: Engine = lambda work: work.done()  # noqa: E731
    return [here, *(helper.done for helper in others)]
