"""Attention of one new token, computed for all query heads of a key/value head at once.

``GroupQueryAttention`` multiplies each query head by itself, and reads the keys and values of a group once
for each of its heads: with seven heads in a group, 8,000 tokens take it twice as long as one product for all
seven. So each layer has both ways, and the caller chooses by the input ``attend_by_groups``:

    If(attend_by_groups)
        then  past with the new token written in, scores = q · keys^T + bias, softmax(scores) · values
        else  GroupQueryAttention

The input is an initializer with the default false, so that other programs get ``GroupQueryAttention``.
Whoever sets it gives one token to each row, and a cache that holds finite numbers up to its end and has room
for the new token: present has the length of past. All of the cache is multiplied, so it pays where most of it
is filled.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from qconvert.formats.recipe import Recipe
from qconvert.formats.stored import BY_GROUPS
from qconvert.lowering.ort.graph import CONTRIB, OrtGraph
from qconvert.models.spec import DecoderSpec

# With fewer query heads to a key/value head one product for all of them takes as long, or longer: with two
# 1.6 times, with three 1.2, with four 0.9, with six 0.8, with seven 0.7 times as long as one by one, behind
# 2,000 tokens in a cache that is full to eight ninths.
_LEAST_GROUP = 4
# Less would overflow where scores are below zero.
_HIDDEN = np.finfo(np.float32).min / 2


def chooses_attention(spec: DecoderSpec, recipe: Recipe) -> bool:
    """Whether the graph that decodes has both ways: its cache holds float32, and a layer has groups."""
    layers = range(spec.num_hidden_layers)
    return recipe.kv_dtype == "float32" and any(has_groups(spec, layer) for layer in layers)


def has_groups(spec: DecoderSpec, layer: int) -> bool:
    """Whether a layer has what this is for: many query heads to a key/value head, and no window."""
    group = spec.num_attention_heads // spec.num_key_value_heads
    return group >= _LEAST_GROUP and spec.sliding_windows[layer] is None


class GroupedAttention:
    """Attention by groups in one graph; what all layers share is computed once.

    Args:
        graph: the one that is being built.
        spec: the decoder's sizes.
        past: keys of a layer, ``[batch, kv_heads, capacity, head_size]``.
        last: int64 ``[batch]``, the place of each row's new token.
        rope: tables of cosines and sines.

    Attributes:
        wanted: the input by which the caller chooses, a bool scalar.
    """

    def __init__(
        self,
        graph: OrtGraph,
        spec: DecoderSpec,
        *,
        past: ir.Value,
        last: ir.Value,
        rope: tuple[ir.Value, ir.Value],
    ) -> None:
        self._graph, self._spec, self._rope = graph, spec, rope
        self.wanted = graph.initializers.constant(BY_GROUPS, np.asarray(False))
        axes = graph.constant("by_groups_axes", [1])
        self._positions = graph.op("Unsqueeze", [last, axes], name=BY_GROUPS)
        # Where it is not wanted, the bias has no columns.
        counted = graph.op("Cast", [self.wanted], {"to": ir.DataType.INT64}, name=BY_GROUPS)
        capacity = graph.op("Shape", [past], {"start": 2, "end": 3}, name=BY_GROUPS)
        limit = graph.op("Squeeze", [graph.op("Mul", [capacity, counted], name=BY_GROUPS)], name=BY_GROUPS)
        places = graph.op(
            "Range",
            [graph.constant("by_groups_first", 0), limit, graph.constant("by_groups_step", 1)],
            name=BY_GROUPS,
        )
        seen = graph.op("LessOrEqual", [places, self._positions], name=BY_GROUPS)
        shown, hidden = (
            graph.initializers.constant(name, np.asarray(number, dtype=np.float32))
            for name, number in (("by_groups_shown", 0), ("by_groups_hidden", _HIDDEN))
        )
        bias = graph.op("Where", [seen, shown, hidden], name=BY_GROUPS)
        self._bias = graph.op("Unsqueeze", [bias, graph.constant("by_groups_heads", [1, 2])], name=BY_GROUPS)
        # Each number of the new token's keys and values goes to the row's place.
        row_axes = graph.constant("by_groups_row", [1, 2])
        each = graph.constant("by_groups_shape", [1, spec.num_key_value_heads, 1, spec.head_size])
        rows = graph.op("Unsqueeze", [self._positions, row_axes], name=BY_GROUPS)
        self._places = graph.op("Expand", [rows, each], name=BY_GROUPS)

    def either(
        self,
        qkv: ir.Value,
        past: list[ir.Value],
        layer: int,
        whole: Callable[[list[ir.Value]], object],
        outputs: list[ir.Value],
    ) -> None:
        """One layer's attention in both ways.

        Args:
            qkv: packed, as a product returns it.
            past: the cache's keys and values.
            layer: its number.
            whole: makes the other way's node, given its outputs.
            outputs: to be made: the context ``[batch, seq, query_size]``, present keys and values.
        """
        graph, name = self._graph, f"model.layers.{layer}.self_attn.attention"
        with graph.nodes.apart() as by_groups:
            found = self._attention(qkv, past, name)
        parts = [ir.Value(name=f"{output.name}.whole", type=output.type) for output in outputs]
        with graph.nodes.apart() as as_one:
            whole(parts)
        branches = {
            "then_branch": ir.Graph([], found, nodes=by_groups, name=f"layer_{layer}_by_groups"),
            "else_branch": ir.Graph([], parts, nodes=as_one, name=f"layer_{layer}_whole"),
        }
        graph.nodes.add("If", [self.wanted], outputs, branches, name=name)

    def _attention(self, qkv: ir.Value, past: list[ir.Value], name: str) -> list[ir.Value]:
        graph, spec = self._graph, self._spec
        heads, size = spec.num_key_value_heads, spec.head_size
        sizes = graph.constant("qkv_sizes", [spec.query_size, spec.kv_size, spec.kv_size])
        query, key, value = graph.ops("Split", [qkv, sizes], {"axis": -1}, 3, name=name)
        query, key = (
            graph.op(
                "RotaryEmbedding",
                [states, self._positions, *self._rope],
                {"num_heads": count},
                domain=CONTRIB,
                name=name,
            )
            for states, count in ((query, spec.num_attention_heads), (key, heads))
        )
        one = graph.constant("by_groups_token", [0, heads, 1, size])
        keys, values = (
            graph.op(
                "ScatterElements",
                [earlier, self._places, graph.op("Reshape", [states, one], name=name)],
                {"axis": 2},
                name=name,
            )
            for earlier, states in zip(past, (key, value))
        )
        group = graph.constant("by_groups_queries", [0, heads, spec.num_attention_heads // heads, size])
        queries = graph.op("Reshape", [query, group], name=name)
        attributes = {"transB": 1, "alpha": size**-0.5}
        scores = graph.op("FusedMatMul", [queries, keys], attributes, domain=CONTRIB, name=name)
        hidden = graph.op("Add", [scores, self._bias], name=name)
        weights = graph.op("Softmax", [hidden], {"axis": -1}, name=name)
        context = graph.op("MatMul", [weights, values], name=name)
        flat = graph.constant("by_groups_context", [0, 1, spec.query_size])
        outputs = [graph.op("Reshape", [context, flat], name=name), keys, values]
        for output, earlier in zip(outputs, (qkv, *past)):
            output.type = ir.TensorType(graph.dtype if earlier is qkv else earlier.dtype or graph.dtype)
        return outputs
