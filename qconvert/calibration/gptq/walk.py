"""One pass through the decoder: each layer is rounded for the inputs that the rounded layers before it give.

Memory: the residual stream of all calibration tokens twice in float32 (once through the true decoder), one
layer's weights twice, the inputs of one product for all tokens, and about four square matrices as wide as
the widest input that is solved.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from typing import TYPE_CHECKING

import torch

from qconvert.calibration.coarse import head_in_halves
from qconvert.calibration.gptq.layer import STAGES, Layer, Stage
from qconvert.calibration.gptq.moments import crossed, squares
from qconvert.calibration.gptq.solve import Means
from qconvert.calibration.statistics import EMBEDDING, final_norm, product_dtype
from qconvert.checkpoint.weights import CheckpointWeights
from qconvert.formats.blocks import pack, unpack
from qconvert.formats.folding import FoldedWeights, Folding
from qconvert.formats.layout import NonFiniteWeightError, PackedWeight, is_finite
from qconvert.formats.recipe import BlockFormat, Recipe
from qconvert.models.families import family_of
from qconvert.parallel import all_threads

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tokens that one thread computes together.
_BATCH_TOKENS = 1024

Solved = dict[str, PackedWeight]


class Walk:
    """The calibration's state between two layers.

    Args:
        model: the checkpoint, of any type; nothing of it is changed.
        recipe: with a format for every linear weight.
        folding: of the weights that are rounded (``equalise.py``).
        sequences: token ids, all of one length.
        workers: threads that share the work (see ``parallel.piece_workers``); how many there are changes
            no bit of what they do.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        recipe: Recipe,
        folding: Folding,
        sequences: Sequence[Sequence[int]],
        workers: Executor,
    ) -> None:
        self._config = model.config
        self._weights = FoldedWeights(CheckpointWeights(model), folding)
        self._recipe = recipe
        self._workers = workers
        tokens = torch.tensor(sequences)
        self._rounded, self._true = self._embed(tokens)
        step = max(1, _BATCH_TOKENS // tokens.shape[1])
        self._parts = [slice(start, start + step) for start in range(0, len(tokens), step)]
        with torch.no_grad():
            positions = torch.arange(tokens.shape[1])[None]
            rotary = family_of(model.config).transformers_class("RotaryEmbedding")(model.config)
            cosines, sines = rotary(self._true, positions)
            self._rope = cosines.to(product_dtype()), sines.to(product_dtype())

    @torch.no_grad()
    def layer(self, index: int, known: Solved | None = None) -> Solved:
        """Solve one layer's weights and move on to the next; ``known`` ones are taken as they are.

        Layers are to be asked for in order, each once.

        Raises:
            NonFiniteWeightError: NaN or Inf in a weight, or in what the layers before make of it.
        """
        true, rounded = (Layer(self._config, index, self._weights, self._rope) for _ in range(2))
        solved: Solved = {}
        for stage in STAGES:
            full_names = {name: f"model.layers.{index}.{name}.weight" for name in stage.names}
            fmt = self._format(full_names)
            solves = known is None
            weights = self._checked(full_names) if known is None else {}
            # Outputs are fewer where a product leads from something wider back to the residual stream.
            narrow = sum(map(len, weights.values())) < true.linears[stage.names[0]].weight.shape[1]
            inputs, missing = self._inputs(stage, true, rounded, solves, narrow)
            if known is not None:
                found = {name: known[full_name] for name, full_name in full_names.items()}
            elif solves:
                means = self._means(inputs, missing)
                if not means.finite:
                    raise NonFiniteWeightError(next(iter(full_names.values())))
                found = means.solve(weights, fmt, self._workers)
            else:
                found = {name: pack(weight, fmt, self._workers) for name, weight in weights.items()}
            for name, packed in found.items():
                linear = rounded.linears[name]
                linear.weight = unpack(packed, fmt, linear.weight.shape[1]).to(product_dtype())
                solved[full_names[name]] = packed
                self._weights.release(full_names[name])
            if stage.adds:
                self._add(rounded.linears[stage.names[0]], inputs)
        return solved

    @torch.no_grad()
    def head(self) -> Solved:
        """The head in halves, after the last layer.

        Raises:
            NonFiniteWeightError: NaN or Inf in it, or in what the layers and the norm before make of it.
        """
        norm = final_norm(self._config, self._weights)
        inputs = [norm(self._rounded[part]).flatten(0, 1) for part in self._parts]
        above = squares(inputs, self._workers).triu()
        products = above + above.triu(1).T
        return head_in_halves(self._weights, self._config, self._recipe, products, self._workers)

    def _inputs(
        self, stage: Stage, true: Layer, rounded: Layer, wanted: bool, narrow: bool
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The rounded decoder's inputs of a stage, ``[tokens, K]`` of each part, and what they miss.

        That is what has to be added to them to have those of the true decoder; or, if ``narrow``, to their
        true products. The true decoder moves on to the next stage.
        """

        def of(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
            ours = stage.reads(rounded, self._rounded[part]).flatten(0, 1)
            theirs = stage.reads(true, self._true[part]).flatten(0, 1)
            if stage.adds or (wanted and narrow):
                products = true.products(stage.names, theirs)
            if stage.adds:
                hidden = self._true[part]
                hidden += products.view_as(hidden)
            missing = torch.empty(0)
            if wanted and narrow:
                missing = products.float() - true.products(stage.names, ours)
            elif wanted:
                missing = theirs.float() - ours
            return ours.to(product_dtype()), missing.to(product_dtype())

        found = list(self._workers.map(of, self._parts))
        return [ours for ours, _ in found], [missing for _, missing in found]

    def _means(self, inputs: list[torch.Tensor], missing: list[torch.Tensor]) -> Means:
        """What a product's inputs are like; ``missing`` is emptied."""
        hessian, shifted = squares(inputs, self._workers), crossed(missing, inputs, self._workers)
        missing.clear()
        with all_threads():
            return Means(hessian, shifted)

    def _add(self, linear: torch.nn.Module, inputs: list[torch.Tensor]) -> None:
        """The product of a stage added to the rounded decoder's residual stream."""

        def add(part: slice, ours: torch.Tensor) -> None:
            hidden = self._rounded[part]
            hidden += linear(ours).view_as(hidden)

        list(self._workers.map(add, self._parts, inputs))

    def _checked(self, names: dict[str, str]) -> dict[str, torch.Tensor]:
        """Weights in float32; ``names`` are theirs in the layer and the checkpoint."""
        weights = {name: self._weights[full_name].float() for name, full_name in names.items()}
        for name, weight in weights.items():
            if not is_finite(weight):
                raise NonFiniteWeightError(names[name])
        return weights

    def _format(self, names: dict[str, str]) -> BlockFormat:
        formats = {self._recipe.format_of(full_name) for full_name in names.values()}
        assert len(formats) == 1, "recipes have exceptions for o_proj and down_proj, which read alone"
        fmt = formats.pop()
        assert fmt is not None, "a recipe that calibrates packs every linear weight"
        return fmt

    def _embed(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the embedding as the export stores them, and as they are in the checkpoint."""
        fmt = self._recipe.head
        occurring, places = torch.unique(tokens, return_inverse=True)
        rows = self._weights[EMBEDDING][occurring].float()
        self._weights.release(EMBEDDING)
        # TensorRT's embedding is float16 whatever the activations are (lowering/trt/decoder.py).
        stored = rows.half().float() if fmt is None else unpack(pack(rows, fmt), fmt, rows.shape[1])
        return stored[places], rows[places]
