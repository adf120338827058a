"""An int8 KV cache: how finely each channel of keys and values is stored, found on a calibration text.

ONNX Runtime's attention rotates a key, divides it by its channel's scale and rounds it to the nearest
of -128 .. 127. Scales are constants of the graph, so they have to hold at every position of every text.
A key's channels are rotated in pairs, by angles that no short text covers; the length of a pair does not
change with the angle, so both channels get the range of the longest pair.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qconvert.calibration.text import batches, calibration_ids
from qconvert.checkpoint.kv_observers import LARGEST, Observed
from qconvert.checkpoint.reference import Reference
from qconvert.formats.folding import NO_FOLDING, Folding
from qconvert.formats.recipe import Recipe
from qconvert.formats.stored import kv_scale_name
from qconvert.progress import Progress

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# Most tokens of a passage that are read: bounds time and memory where every byte is a token.
_LONGEST = 512
# Room above what the calibration has seen. Mean KL of the sample on texts of another kind, 256 tokens each:
# 0.0015 to 0.0028 with it, 0.0021 to 0.0038 with 1.25; but 0.02 to 0.04 where 0.7 cuts values off.
MARGIN = 1.1


# float32 [1, kv_heads, 1, head_size] by the names of their initializers.
KVScales = Mapping[str, "torch.Tensor"]


def scales_for(
    recipe: Recipe,
    model: PreTrainedModel,
    tokenizer_folder: Path,
    progress: Progress,
    folding: Folding = NO_FOLDING,
) -> KVScales:
    """The scales that a recipe needs: none, unless its KV cache is of 8 bits.

    They come from the package's own text, read some sequences at a time, in float32. Values that the
    ``folding`` of the graphs divides are stored as much smaller.
    """
    if recipe.kv_cache is None:
        return {}
    context = min(model.config.max_position_embeddings, _LONGEST)
    sequences = [ids[:context] for ids in calibration_ids(tokenizer_folder, model.config.vocab_size)]
    observed = Observed()
    reference = Reference(model, kv=observed)
    with progress.task("looking at keys and values", sum(map(len, sequences))) as advance:
        for batch in batches(sequences):
            reference.hidden_states(batch)
            advance(sum(map(len, batch)))
    return {
        kv_scale_name(*place): scale_of(largest / folding.of_cache(*place, largest))[
            None, :, None, :
        ].contiguous()
        for place, largest in observed.largest.items()
    }


def scale_of(largest: torch.Tensor) -> torch.Tensor:
    """Scales for channels whose largest magnitude was ``largest``; of the same shape."""
    import torch

    scale = largest * (MARGIN / LARGEST)
    # Where a channel holds zeros only, or no finite value, any scale but 0 will do.
    return torch.where(torch.isfinite(scale) & (scale > 0), scale, torch.ones_like(scale))
