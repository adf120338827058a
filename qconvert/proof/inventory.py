"""Everything that a stored graph holds besides nodes: tables, constants, and nothing that has no place there.

No logit shows what lies beyond the few hundred positions that the proof runs, or below the rounding of 8
bits: a table of angles that ends too early, the end of a slice, a step that is a little off. All these can be
read.
``_CONSTANTS`` has every constant of an export and what it follows from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qconvert.formats.channels import groups_in_a_part
from qconvert.formats.graph_file import load_graph
from qconvert.formats.recipe import ChannelFormat
from qconvert.formats.shortlist import Shortlist
from qconvert.formats.stored import BY_GROUPS, ORDER_PREFIX, joined_name, kv_scale_name
from qconvert.models.decoder import lower_decoder
from qconvert.models.recorder import tensor_groups
from qconvert.models.spec import DecoderSpec
from qconvert.proof.graph_check import faults_of_graphs
from qconvert.proof.weight_check import WeightFault
from qrun.folder.manifest import Manifest

_INT64_MAX = np.iinfo(np.int64).max
_TABLES = ("cos_cache", "sin_cache")
# Weights that have a residual in common, and whose features are added up for it.
_BLOCK = 32


@dataclass(frozen=True)
class _Due:
    """What constants follow from: the model's sizes, and what the manifest says of the export."""

    spec: DecoderSpec
    length: int
    recipe: Mapping[str, Any]
    static: bool

    @property
    def shortlist(self) -> Shortlist:
        return Shortlist.of(self.recipe["shortlist"], self.spec.vocab_size)

    @property
    def head_blocks(self) -> tuple[int, int]:
        """How many blocks a row of the head has, and their size."""
        size = self.recipe["head"]["block_size"]
        return self.spec.hidden_size // size, size

    @property
    def mlp_groups(self) -> tuple[int, int]:
        """Of the integer products: groups in a part of the MLP's channels, and the width of each."""
        of_all, of_prompts = self.recipe["linear"], self.recipe["prefill"]
        fmt = ChannelFormat(**(of_prompts or of_all))
        groups = groups_in_a_part(self.spec.intermediate_size, fmt)
        return groups, self.spec.intermediate_size // (fmt.mlp_parts * groups)


_CONSTANTS: dict[str, Callable[[_Due], Any]] = {
    # Which positions' logits are wanted, and how long rows are.
    "logits_start": lambda due: [0],
    "positions_end": lambda due: [_INT64_MAX],
    "positions_axis": lambda due: [1],
    "mask_axis": lambda due: [1],
    "mask_axis_scalar": lambda due: 1,
    "one": lambda due: 1 if due.static else [1],
    # Integer products.
    "features_axis": lambda due: [-1],
    "smallest_scale": lambda due: np.float32(1e-30),
    "one_127th": lambda due: np.float32(1 / 127),
    "activation_zero_point": lambda due: 128,
    "groups_shape": lambda due: [0, 0, *due.mlp_groups],
    "features_shape": lambda due: [0, 0, due.spec.hidden_size],
    # The head's input in two summands.
    "head_blocks_shape": lambda due: [0, 0, *due.head_blocks],
    "summands_axis": lambda due: [0],
    "summands_shape": lambda due: [2, 0, 0, due.spec.hidden_size],
    # Logits in two steps.
    "upper_half": lambda due: 16,
    "shortlist_ranges": lambda due: [
        -1,
        due.shortlist.ranges,
        due.spec.vocab_size // due.shortlist.ranges,
    ],
    "shortlist_size": lambda due: [due.shortlist.per_range],
    "shortlist_starts": lambda due: [
        [start] for start in range(0, due.spec.vocab_size, due.spec.vocab_size // due.shortlist.ranges)
    ],
    "shortlist_shape": lambda due: [-1, due.shortlist.ranges * due.shortlist.per_range],
    "hidden_rows_shape": lambda due: [-1, due.spec.hidden_size],
    "logits_rows_shape": lambda due: [-1, due.spec.vocab_size],
    # Keys and values.
    "qkv_sizes": lambda due: [due.spec.query_size, due.spec.kv_size, due.spec.kv_size],
    "kv_scale_shape": lambda due: [-1],
    "kv_step": lambda due: 1,
    "kv_zero_point": lambda due: 0,
    "kv_start": lambda due: [0],
    "kv_axis": lambda due: [2],
    # Attention of one token by groups.
    BY_GROUPS: lambda due: False,
    "by_groups_axes": lambda due: [1],
    "by_groups_first": lambda due: 0,
    "by_groups_step": lambda due: 1,
    "by_groups_shown": lambda due: 0,
    "by_groups_hidden": lambda due: np.finfo(np.float32).min / 2,
    "by_groups_heads": lambda due: [1, 2],
    "by_groups_row": lambda due: [1, 2],
    "by_groups_shape": lambda due: [1, due.spec.num_key_value_heads, 1, due.spec.head_size],
    "by_groups_token": lambda due: [0, due.spec.num_key_value_heads, 1, due.spec.head_size],
    "by_groups_queries": lambda due: [
        0,
        due.spec.num_key_value_heads,
        due.spec.num_attention_heads // due.spec.num_key_value_heads,
        due.spec.head_size,
    ],
    "by_groups_context": lambda due: [0, 1, due.spec.query_size],
    # A cache of one length, for TensorRT.
    "attention_scale": lambda due: np.float32(due.spec.head_size**-0.5),
    "first": lambda due: 0,
    "last": lambda due: -1,
    "flat": lambda due: [0, 0, -1],
    "query_axes": lambda due: [1, 3],
    "key_positions": lambda due: np.arange(due.length),
}


def check_inventory(manifest: Manifest, spec: DecoderSpec) -> list[WeightFault]:
    """All graphs of a folder; faults have the names of tensors, and of files beside the first."""
    due = _Due(
        spec, manifest.model.context_length, manifest.raw.get("recipe", {}), manifest.target == "tensorrt"
    )
    return faults_of_graphs(manifest, lambda path: _check(path, due))


def _check(path: Path, due: _Due) -> Iterator[WeightFault]:
    constants = _CONSTANTS | _of_sizes(due.spec)
    groups = tensor_groups(due.spec, lower_decoder)
    weights = tuple(joined_name(group) for group in groups)
    if due.recipe.get("kept"):  # the checkpoint may hold neighbours in different ways
        weights = (*weights, *(name for group in groups for name in group))
    scales = {
        kv_scale_name(layer, part) for layer in range(due.spec.num_hidden_layers) for part in ("key", "value")
    }
    for graph in _graphs(load_graph(path).graph):
        for name, value in graph.initializers.items():
            if value.const_value is None:
                yield WeightFault(name, "it has no content")
            elif name in constants:
                try:
                    wanted = constants[name](due)
                except (KeyError, TypeError):
                    yield WeightFault(name, "the manifest's recipe does not say what this constant is")
                    continue
                yield from _constant_fault(name, value.const_value.numpy(), wanted)
            elif name in _TABLES:
                yield from _table_fault(name, tuple(value.const_value.shape.numpy()), due)
            elif name.startswith(ORDER_PREFIX):
                pass  # the Gather that reads it is checked, and the columns of the matrices behind it
            elif name not in scales and not _belongs(name, weights):
                yield WeightFault(name, "a tensor that has no place in an export")


def _graphs(graph: ir.Graph) -> Iterator[ir.Graph]:
    """A graph and the bodies of its loops."""
    yield graph
    for node in ir.traversal.RecursiveGraphIterator(graph):
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield attribute.as_graph()


def _belongs(name: str, weights: tuple[str, ...]) -> bool:
    """Whether it is a part of a stored matrix or vector: those are held against the checkpoint's."""
    return any(name == weight or name.startswith(f"{weight}.") for weight in weights)


def _of_sizes(spec: DecoderSpec) -> dict[str, Callable[[_Due], Any]]:
    """Constants that carry a size of this model in their names."""
    sizes: dict[str, Any] = {}
    for count in (spec.num_attention_heads, spec.num_key_value_heads):
        split = [0, 0, count, spec.head_size]
        sizes |= {f"{count}_heads": split, f"{count}_split_heads": split}
        sizes[f"{count}_heads_whole"] = [0, 0, count * spec.head_size]
    for columns in (spec.hidden_size, spec.query_size, spec.intermediate_size):
        blocks = columns // _BLOCK
        sizes[f"{blocks}_blocks_of_{_BLOCK}"] = [0, 0, blocks, _BLOCK]
    windows = {f"window_{window}": window for window in spec.sliding_windows if window is not None}
    return {name: lambda due, value=value: value for name, value in (sizes | windows).items()}  # type: ignore[misc]


def _constant_fault(name: str, found: NDArray[Any], due: Any) -> Iterator[WeightFault]:
    wanted = np.asarray(due)
    if found.shape != wanted.shape or not np.array_equal(found, wanted.astype(found.dtype)):
        yield WeightFault(name, f"the constant is {_short(found)}, due is {_short(wanted)}")


def _short(array: NDArray[Any]) -> str:
    return str(array.tolist()) if array.size <= 8 else f"{list(array.shape)} numbers"


def _table_fault(name: str, shape: tuple[int, ...], due: _Due) -> Iterator[WeightFault]:
    wanted = (due.length, due.spec.head_size // 2)
    if shape != wanted:
        yield WeightFault(name, f"the table of angles has the shape {list(shape)}, due is {list(wanted)}")
