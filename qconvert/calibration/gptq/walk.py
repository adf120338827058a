"""One pass through the decoder: each layer is rounded for the inputs that the rounded layers before it give.

Memory: one layer in float32 twice, the inputs of the layer for all calibration tokens twice (once
through the true decoder), and about five square matrices as wide as the widest input that is solved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from typing import TYPE_CHECKING

import torch

from qconvert.calibration.gptq.layer import STAGES, Layer, Reads
from qconvert.calibration.gptq.solve import Means
from qconvert.calibration.statistics import EMBEDDING
from qconvert.checkpoint.weights import CheckpointWeights
from qconvert.formats.blocks import pack, unpack
from qconvert.formats.layout import NonFiniteWeightError, PackedWeight
from qconvert.formats.recipe import BlockFormat, Recipe
from qconvert.models.families import family_of
from qconvert.parallel import all_threads

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Sequences whose inputs are in memory together.
_BATCH = 4

Solved = dict[str, PackedWeight]


class Walk:
    """The calibration's state between two layers.

    Args:
        model: the checkpoint, of any type; nothing of it is changed.
        recipe: with a format for every linear weight and the embedding.
        sequences: token ids, all of one length.
        workers: threads that share the work (see ``parallel.piece_workers``).
    """

    def __init__(
        self, model: PreTrainedModel, recipe: Recipe, sequences: Sequence[Sequence[int]], workers: Executor
    ) -> None:
        self._config = model.config
        self._weights = CheckpointWeights(model)
        self._recipe = recipe
        self._workers = workers
        tokens = torch.tensor(sequences)
        self._rounded, self._true = self._embed(tokens)
        with torch.no_grad():
            positions = torch.arange(tokens.shape[1])[None]
            rotary = family_of(model.config).transformers_class("RotaryEmbedding")(model.config)
            self._rope = rotary(self._true, positions)

    def layer(self, index: int, known: Solved | None = None) -> Solved:
        """Solve one layer's weights and move on to the next; ``known`` ones are taken as they are.

        Layers are to be asked for in order, each once.

        Raises:
            NonFiniteWeightError: NaN or Inf in a weight, or in what the layers before make of it.
        """
        true, rounded = (Layer(self._config, index, self._weights, self._rope) for _ in range(2))
        prefix, solved = f"model.layers.{index}.", {}
        for names, reads, adds in STAGES:
            full_names = {name: f"{prefix}{name}.weight" for name in names}
            if known is None:
                found = self._solve(true, rounded, full_names, reads)
            else:
                found = {name: known[full_name] for name, full_name in full_names.items()}
            for name, packed in found.items():
                linear, full_name = rounded.linears[name], full_names[name]
                linear.weight.data = unpack(packed, self._format(full_name), linear.in_features)
                solved[full_name] = packed
            if adds is not None:
                for part in self._batches():
                    self._true[part] += self._compute(adds, true, self._true[part])
                    self._rounded[part] += self._compute(adds, rounded, self._rounded[part])
        return solved

    def _solve(
        self, true: Layer, rounded: Layer, names: dict[str, str], reads: Reads
    ) -> dict[str, PackedWeight]:
        """Round tensors that read the same input; ``names`` are theirs in the layer and the checkpoint."""
        weights = {name: true.linears[name].weight.data for name in names}
        for name, weight in weights.items():
            if not bool(torch.isfinite(weight).all()):
                raise NonFiniteWeightError(names[name])
        formats = {name: self._format(full_name) for name, full_name in names.items()}
        if all(fmt.bits == 8 for fmt in formats.values()):
            return {name: pack(weights[name], fmt, self._workers) for name, fmt in formats.items()}
        means = self._means(true, rounded, reads)
        if not means.finite:
            raise NonFiniteWeightError(next(iter(names.values())))
        return {name: means.solve(weights[name], fmt, self._workers) for name, fmt in formats.items()}

    def _means(self, true: Layer, rounded: Layer, reads: Reads) -> Means:
        """What a product's inputs are like, in the rounded decoder and in the true one."""
        squares = crossed = torch.empty(0)
        for part in self._batches():
            ours = self._compute(reads, rounded, self._rounded[part]).flatten(0, 1)
            theirs = self._compute(reads, true, self._true[part]).flatten(0, 1)
            if not len(squares):
                squares, crossed = (torch.zeros(ours.shape[1], ours.shape[1]) for _ in range(2))
            self._add_products(squares, ours, ours)
            self._add_products(crossed, theirs, ours)
        tokens = self._true.shape[0] * self._true.shape[1]
        with all_threads():
            return Means(squares.div_(tokens), crossed.div_(tokens))

    def _add_products(self, total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
        """``total += left^T right``, some rows of it by each thread."""
        step = max(64, len(total) // 16)
        cuts = [slice(start, start + step) for start in range(0, len(total), step)]
        for _ in self._workers.map(lambda rows: total[rows].addmm_(left[:, rows].t(), right), cuts):
            pass  # map is lazy: this waits, and raises a thread's error

    def _compute(self, reads: Reads, layer: Layer, hidden: torch.Tensor) -> torch.Tensor:
        """``reads`` of some sequences, each by one thread."""
        return torch.cat(list(self._workers.map(lambda sequence: reads(layer, sequence[None]), hidden)))

    def _format(self, full_name: str) -> BlockFormat:
        fmt = self._recipe.format_of(full_name)
        assert fmt is not None, "a recipe that calibrates packs every linear weight"
        return fmt

    def _embed(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the embedding as the export stores them, and as they are in the checkpoint."""
        fmt = self._recipe.head
        assert fmt is not None, "a recipe that calibrates packs the embedding as well"
        occurring, places = torch.unique(tokens, return_inverse=True)
        rows = self._weights[EMBEDDING][occurring].float()
        self._weights.release(EMBEDDING)
        stored = unpack(pack(rows, fmt), fmt, rows.shape[1])
        return stored[places], rows[places]

    def _batches(self) -> Iterator[slice]:
        for start in range(0, len(self._true), _BATCH):
            yield slice(start, start + _BATCH)
