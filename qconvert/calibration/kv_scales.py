"""An int8 KV cache: how finely each channel of keys and values is stored, found on a calibration text.

ONNX Runtime's attention rotates a key, divides it by its channel's scale and rounds it to the nearest
of -128 .. 127. Scales are constants of the graph, so they have to hold at every position of every text.
A key's channels are rotated in pairs, by angles that no short text covers; the length of a pair does not
change with the angle, so both channels get the range of the longest pair.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from qconvert.checkpoint.kv_observers import LARGEST, Observed
from qconvert.formats.folding import NO_FOLDING, Folding
from qconvert.formats.stored import kv_scale_name

if TYPE_CHECKING:
    import torch

# Room above what the calibration has seen. Mean KL of the sample on texts of another kind, 256 tokens each:
# 0.0015 to 0.0028 with it, 0.0021 to 0.0038 with 1.25; but 0.02 to 0.04 where 0.7 cuts values off.
MARGIN = 1.1


# float32 [1, kv_heads, 1, head_size] by the names of their initializers.
KVScales = Mapping[str, "torch.Tensor"]


def scales_for(seen: Observed | None, folding: Folding = NO_FOLDING) -> KVScales:
    """The scales for keys and values as they were seen: none, unless the KV cache is of 8 bits.

    Values that the ``folding`` of the graphs divides are stored as much smaller.
    """
    if seen is None:
        return {}
    return {
        kv_scale_name(*place): scale_of(largest / folding.of_cache(*place, largest))[
            None, :, None, :
        ].contiguous()
        for place, largest in seen.largest.items()
    }


def scale_of(largest: torch.Tensor) -> torch.Tensor:
    """Scales for channels whose largest magnitude was ``largest``; of the same shape."""
    import torch

    scale = largest * (MARGIN / LARGEST)
    # Where a channel holds zeros only, or no finite value, any scale but 0 will do.
    return torch.where(torch.isfinite(scale) & (scale > 0), scale, torch.ones_like(scale))
