"""What integer products and an int8 KV cache ask of a calibration text, seen in one pass of it.

The pass may be one of its own, or that of a recipe which reads a text anyway (``awq.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from qconvert.calibration.statistics import Look, Pass
from qconvert.checkpoint.kv_observers import Observed
from qconvert.formats.folding import FoldedInput, folded_inputs
from qconvert.formats.recipe import Recipe
from qconvert.parallel import all_threads

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tokens of the text, spread over it.
TOKENS = 4096


class ColumnSizes:
    """The size of an input's columns, in units of a token's root mean square.

    It is the fourth root of the mean fourth power over tokens. With the maximum a single token would decide;
    one with massive activations, which has a scale of its own anyway, would count like a thousand others.
    """

    def __init__(self) -> None:
        self._total = torch.zeros(())
        self._tokens = 0

    def add(self, inputs: torch.Tensor) -> None:
        """Look at some tokens, float32 ``[tokens, K]``."""
        power = inputs.square()
        mean = power.mean(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny)
        self._total = self._total + power.div_(mean).square_().sum(0)
        self._tokens += len(inputs)

    @property
    def size(self) -> torch.Tensor:
        """Float32 ``[K]``."""
        return (self._total / max(1, self._tokens)).pow(0.25)


class Observer:
    """Looks at what a recipe asks for while a ``Pass`` goes through the decoder.

    Attributes:
        sizes: of the columns of every input that integer products fold; none where the recipe has no such
            products.
        kv: sees keys and values, where the recipe rounds them.
    """

    def __init__(self, recipe: Recipe, layers: int) -> None:
        integers = recipe.integer_products
        folds = integers is not None and integers.smoothing is not None
        self.sizes: Mapping[FoldedInput, ColumnSizes] = {
            found: ColumnSizes() for layer in range(layers if folds else 0) for found in folded_inputs(layer)
        }
        self.kv = Observed() if recipe.kv_cache is not None else None

    @property
    def idle(self) -> bool:
        """Whether there is nothing to look at."""
        return not self.sizes and self.kv is None

    def looks(self, layer: int) -> dict[str, Look]:
        """For ``Pass.layer``: by the name of a product in the layer, what looks at its inputs."""
        prefix = f"model.layers.{layer}."
        return {
            found.readers[0].removeprefix(prefix).removesuffix(".weight"): self.sizes[found].add
            for found in (folded_inputs(layer) if self.sizes else ())
        }


def observe(
    model: PreTrainedModel,
    sequences: Sequence[Sequence[int]],
    observer: Observer,
    advance: Callable[[int], object] | None = None,
) -> None:
    """A pass for the observer alone.

    Args:
        model: the checkpoint, of any type; nothing of it is changed.
        sequences: token ids, all of one length.
        observer: what looks.
        advance: called with 1 after each layer.
    """
    decoder = Pass(model, sequences, observer)
    with all_threads():
        for layer in range(model.config.num_hidden_layers):
            decoder.layer(layer)
            if advance is not None:
                advance(1)
