"""How a tensor of the checkpoint is named in a graph and found again: written and read through this file.

``LAYOUTS`` is the table of all layouts. The lowering writes through ``Layout.pack`` and ``Layout.parts``, the
proof reads through ``find``, a forecast adds up the sizes of ``Layout.parts``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qconvert.formats.blocks import Blocks, find_blocks
from qconvert.formats.channels import find_channels, find_input_channels
from qconvert.formats.columns import find_columns
from qconvert.formats.halves import Halves, find_halves
from qconvert.formats.layout import Arrays, Layout, Stored, as_tensor
from qconvert.formats.recipe import BlockFormat

if TYPE_CHECKING:
    import torch

# Each looks for a matrix of the given name in its own layout, and returns None where there is none.
# The last argument is the number of columns in the checkpoint: blocks may be padded.
LAYOUTS: tuple[Callable[[Arrays, str, int], Stored | None], ...] = (
    find_columns,  # 4 bits, for TensorRT
    find_channels,  # 8 bits for integer products
    find_input_channels,  # the same, cut along the inputs
    find_halves,  # 8 bits as two matrices of 4
    find_blocks,  # 4 or 8 bits
)

# Initializers from which a finished graph's shortlist can be read.
SHORTLIST_RANGES = "shortlist_ranges"  # int64 [-1, ranges, tokens of the vocabulary in each]
SHORTLIST_SIZE = "shortlist_size"  # int64 [tokens chosen in each range]
# Input with the default false: attention of one token by groups (lowering/ort/grouped.py).
BY_GROUPS = "attend_by_groups"
# Embedding and head: the tensors that are looked up or multiplied by the vocabulary.
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
# Begins the names of orders of inputs, int32 [features], in which a checkpoint's matrices are stored.
ORDER_PREFIX = "order_of_inputs."


def layout_of(fmt: BlockFormat) -> Layout:
    """How a recipe's blocks are stored for ONNX Runtime."""
    return Halves(fmt) if fmt.halves else Blocks(fmt)


def find(arrays: Arrays, names: Sequence[str], columns: int = 1) -> Stored:
    """Tensors of the checkpoint that stand side by side in a graph.

    Args:
        arrays: the graph's initializers.
        names: in the checkpoint.
        columns: of the checkpoint's tensors; 1 for vectors.

    Raises:
        QconvertError: the graph does not hold them.
    """
    joined = joined_name(names)
    found = (find_layout(arrays, joined, columns) for find_layout in LAYOUTS)
    return next((stored for stored in found if stored is not None), None) or StoredAsIs(arrays[joined])


def is_stored(arrays: Arrays, names: Sequence[str]) -> bool:
    """Whether a graph holds such tensors side by side, in any layout."""
    joined = joined_name(names)
    return joined in arrays or any(find_layout(arrays, joined, 1) is not None for find_layout in LAYOUTS)


class StoredAsIs:
    """A tensor whose values were cast at most; see ``layout.Stored``."""

    rounding = None
    scale_rounding = 0.0

    def __init__(self, data: NDArray[Any]) -> None:
        self._data = data
        self.shape: tuple[int, ...] = data.shape
        self.dtype = data.dtype.name

    def rows(self, wanted: slice | NDArray[np.int64]) -> torch.Tensor:
        """Some rows in float32."""
        return as_tensor(self._data[wanted]).float()


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
