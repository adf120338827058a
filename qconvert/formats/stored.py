"""How stored tensors are named in a graph: what the lowering writes, the proof finds under the same names."""

from __future__ import annotations

from collections.abc import Sequence

# Initializers from which a finished graph's shortlist can be read.
SHORTLIST_RANGES = "shortlist_ranges"  # int64 [-1, ranges, tokens of the vocabulary in each]
SHORTLIST_SIZE = "shortlist_size"  # int64 [tokens chosen in each range]


def joined_name(names: Sequence[str]) -> str:
    """One name for tensors side by side: q_proj, k_proj and v_proj become ``q_k_v_proj``."""
    if len(names) == 1:
        return names[0]
    before, part, kind = names[0].rsplit(".", 2)
    stem = part.rsplit("_", 1)[-1]
    heads = "_".join(name.rsplit(".", 2)[1].removesuffix(f"_{stem}") for name in names)
    return f"{before}.{heads}_{stem}.{kind}"


def kv_scale_name(layer: int, part: str) -> str:
    """The initializer with the scales of a layer's int8 "key" or "value" ``[1, kv_heads, 1, head_size]``."""
    return f"model.layers.{layer}.self_attn.{part}_scale"
