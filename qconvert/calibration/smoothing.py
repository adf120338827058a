"""Factors that move an input's large channels into the weights, found on a calibration text.

Qwen2 models have input channels hundreds of times as large as others. Rounded to 8 bits with one scale
per token, they leave few steps to the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from qconvert.checkpoint.weights import CheckpointWeights
from qconvert.formats.folding import LARGEST_FACTOR, NO_FOLDING, FoldedInput, Folding
from qconvert.formats.recipe import Recipe

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from qconvert.calibration.observer import Observer


def folding_for(recipe: Recipe, model: PreTrainedModel, seen: Observer) -> Folding:
    """The folding that a recipe asks for, from what was seen of the model's activations."""
    fmt = recipe.integer_products
    if fmt is None or fmt.smoothing is None:
        return NO_FOLDING
    return smooth(model, {found: columns.size for found, columns in seen.sizes.items()}, fmt.smoothing)


def smooth(model: PreTrainedModel, sizes: Mapping[FoldedInput, torch.Tensor], strength: float) -> Folding:
    """Factors for every input of every layer.

    f = size^strength / w^(1 - strength) for each column, with w the largest weight that reads it; scaled so
    that their geometric mean is 1.

    Args:
        model: the checkpoint; its weights are untouched, and upcast one module at a time.
        sizes: of each input's columns, as ``observer.ColumnSizes`` finds them.
        strength: 0 to 1: how much goes from inputs into weights.
    """
    weights = CheckpointWeights(model)
    factors: dict[FoldedInput, torch.Tensor] = {}
    for found, size in sizes.items():
        factors[found] = factors_of_input(size, [weights[name] for name in found.readers], strength)
        for name in found.readers:
            weights.release(name)
    return Folding.of_inputs(factors)


def factors_of_input(size: torch.Tensor, readers: Sequence[torch.Tensor], strength: float) -> torch.Tensor:
    """The same for one input ``[columns]`` and the matrices ``[N, columns]`` that read it."""
    import torch

    largest = torch.zeros_like(size)
    for weight in readers:
        low, high = torch.aminmax(weight, dim=0)
        largest = torch.maximum(largest, torch.maximum(high, -low).float())
    return factors_for(size, largest, strength)


def factors_for(size: torch.Tensor, largest: torch.Tensor, strength: float) -> torch.Tensor:
    """The factors ``[columns]`` of one input; 1 for columns without input or weights, or not finite."""
    import torch

    logarithm = strength * size.log() - (1 - strength) * largest.log()
    usable = torch.isfinite(logarithm)
    if not bool(usable.any()):
        return torch.ones_like(size)
    factors = (logarithm - logarithm[usable].mean()).exp()
    factors.clamp_(1 / LARGEST_FACTOR, LARGEST_FACTOR)
    return torch.where(usable, factors, torch.ones_like(factors))
