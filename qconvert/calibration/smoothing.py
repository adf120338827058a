"""Factors that move an input's large channels into the weights, found on a calibration text.

Qwen2 models have input channels hundreds of times as large as others. Rounded to 8 bits with one scale
per token, they leave few steps to the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qconvert.calibration.text import batches, calibration_ids
from qconvert.checkpoint.reference import Reference
from qconvert.checkpoint.weights import CheckpointWeights
from qconvert.formats.folding import LARGEST_FACTOR, NO_FOLDING, FoldedInput, Folding, folded_inputs
from qconvert.formats.recipe import Recipe
from qconvert.progress import Progress

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# Most tokens of a passage that are read: bounds time and memory where every byte is a token.
_LONGEST = 256


def folding_for(
    recipe: Recipe, model: PreTrainedModel, tokenizer_folder: Path, progress: Progress
) -> Folding:
    """The folding that a recipe asks for, calibrated on the package's own text."""
    fmt = recipe.integer_products
    if fmt is None or fmt.smoothing is None:
        return NO_FOLDING
    context, sequences = (
        min(model.config.max_position_embeddings, _LONGEST),
        calibration_ids(tokenizer_folder, model.config.vocab_size),
    )
    sequences = [sequence[:context] for sequence in sequences]
    with progress.task("looking at activations", sum(map(len, sequences))) as advance:
        return smooth(model, sequences, fmt.smoothing, advance)


def smooth(
    model: PreTrainedModel,
    sequences: Sequence[Sequence[int]],
    strength: float,
    advance: Callable[[int], Any] | None = None,
) -> Folding:
    """Factors for every input of every layer, from what the sequences give in float32.

    f = size^strength / w^(1 - strength) for each column, with ``size`` of ``column_sizes`` and w the
    largest weight that reads it; scaled so that their geometric mean is 1.

    Args:
        model: the checkpoint; its weights are untouched, and upcast one module at a time.
        sequences: token ids; some run together (see ``calibration.batches``).
        strength: 0 to 1: how much goes from inputs into weights.
        advance: called with the number of tokens after each batch.
    """
    import torch

    sizes = column_sizes(model, sequences, advance)
    weights = CheckpointWeights(model)
    factors: dict[FoldedInput, torch.Tensor] = {}
    for found, size in sizes.items():
        largest = torch.zeros_like(size)
        for name in found.readers:
            low, high = torch.aminmax(weights[name], dim=0)
            largest = torch.maximum(largest, torch.maximum(high, -low).float())
            weights.release(name)
        factors[found] = factors_for(size, largest, strength)
    return Folding.of_inputs(factors)


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


def column_sizes(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], advance: Callable[[int], Any] | None = None
) -> dict[FoldedInput, torch.Tensor]:
    """The size of each input's columns, float32 ``[columns]``, in units of a token's root mean square.

    It is the fourth root of the mean fourth power over tokens. With the maximum a single token would decide;
    one with massive activations, which has a scale of its own anyway, would count like a thousand others.
    """
    import torch

    inputs = [found for layer in range(model.config.num_hidden_layers) for found in folded_inputs(layer)]
    totals: dict[FoldedInput, torch.Tensor] = {}
    real = torch.empty(0)  # bool [batch, tokens]: where there is no padding

    def watch(found: FoldedInput) -> Callable[..., None]:
        def look(module: Any, arguments: tuple[torch.Tensor]) -> None:
            tokens = arguments[0][real]
            power = tokens.square()
            mean = power.mean(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny)
            total = power.div_(mean).square_().sum(0)
            totals[found] = totals[found] + total if found in totals else total

        return look

    handles = [
        model.get_submodule(found.readers[0].removesuffix(".weight")).register_forward_pre_hook(watch(found))
        for found in inputs
    ]
    reference = Reference(model)
    try:
        for batch in batches(sequences):
            lengths = torch.tensor([len(sequence) for sequence in batch])
            real = torch.arange(int(lengths.max())) < lengths[:, None]
            reference.hidden_states(batch)
            if advance is not None:
                advance(int(lengths.sum()))
    finally:
        for handle in handles:
            handle.remove()
    count = sum(map(len, sequences))
    return {found: (totals[found] / count).pow(0.25) for found in inputs}
