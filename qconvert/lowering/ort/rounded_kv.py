"""Attention of a graph that reads prompts into a KV cache of 8 bits, computed by the kernel for float32.

``GroupQueryAttention`` over a cache of 8 bits takes three to five times as long for a prompt as over one
of float32. So this graph turns what the cache holds into float32, rounds new keys and values as that kernel
does, and lets the kernel for float32 attend to the rounded ones: a prompt gives the same logits either way,
in pieces or whole. The codes of the new tokens are its outputs; the runtime writes them after the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from qconvert.formats.stored import kv_scale_name
from qconvert.lowering.ort.graph import CONTRIB, OrtGraph
from qconvert.models.spec import DecoderSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

_PARTS = ("key", "value")


class RoundedKV:
    """The cache of one graph.

    Args:
        graph: the one that is being built.
        spec: the decoder's sizes.
        inputs: token ids ``[batch, seq]`` and attention mask ``[batch, total]``.
        lengths: of ``GroupQueryAttention``: tokens of each row less one, and of the longest row.
        rope: tables of cosines and sines.

    Attributes:
        codes: int8 ``[batch, seq, kv_heads x head_size]`` of the new tokens, by layer, keys before values.
    """

    def __init__(
        self,
        graph: OrtGraph,
        spec: DecoderSpec,
        *,
        inputs: tuple[ir.Value, ir.Value],
        lengths: tuple[ir.Value, ir.Value],
        rope: tuple[ir.Value, ir.Value],
    ) -> None:
        self._graph = graph
        self._spec = spec
        self._lengths = lengths
        self._rope = rope
        self.codes: list[ir.Value] = []
        new, total = (graph.op("Shape", [value], {"start": 1, "end": 2}) for value in inputs)
        self._filled = graph.op("Sub", [total, new])

    def attention(
        self, qkv: ir.Value, past: list[ir.Value], layer: int, attributes: Mapping[str, Any]
    ) -> ir.Value:
        """The context ``[batch, seq, query_size]`` of one layer.

        Args:
            qkv: packed, as a product returns it.
            past: the cache's int8 keys and values ``[batch, kv_heads, capacity, head_size]``.
            layer: its number.
            attributes: of ``GroupQueryAttention``.
        """
        graph, spec, name = self._graph, self._spec, f"model.layers.{layer}.self_attn.attention"
        kv_size = spec.num_key_value_heads * spec.head_size
        sizes = graph.initializers.constant("qkv_sizes", np.array([spec.query_size, kv_size, kv_size]))
        query, key, value = graph.ops("Split", [qkv, sizes], {"axis": -1}, 3, name=name)
        query, key = (
            graph.op(
                "RotaryEmbedding",
                [states, self._filled, *self._rope],
                {"num_heads": heads},
                domain=CONTRIB,
                name=name,
            )
            for states, heads in ((query, spec.num_attention_heads), (key, spec.num_key_value_heads))
        )
        rounded = [self._round(states, layer, part) for states, part in zip((key, value), _PARTS)]
        earlier = [self._read(codes, layer, part) for codes, part in zip(past, _PARTS)]
        # The operator must have outputs for keys and values; nothing reads them.
        context, *_ = graph.ops(
            "GroupQueryAttention",
            [query, *rounded, *earlier, *self._lengths],
            {**attributes, "do_rotary": 0},
            3,
            domain=CONTRIB,
            name=name,
        )
        return context

    def _round(self, states: ir.Value, layer: int, part: str) -> ir.Value:
        """New keys or values as the cache will hold them; their codes become an output."""
        graph, name = self._graph, f"model.layers.{layer}.self_attn.{part}s"
        flat = graph.op("Reshape", [self._scale(layer, part), self._shape("kv_scale_shape", -1)], name=name)
        one, zero = (
            graph.initializers.constant("kv_step", np.asarray(1, dtype=np.float32)),
            graph.initializers.constant("kv_zero_point", np.asarray(0, dtype=np.int8)),
        )
        scaled = graph.op("Div", [states, flat], name=name)
        codes = graph.op("QuantizeLinear", [scaled, one, zero], name=name)
        codes.name = f"new.{layer}.{part}"
        codes.type = ir.TensorType(ir.DataType.INT8)
        codes.shape = ir.Shape(("batch", "sequence", self._spec.num_key_value_heads * self._spec.head_size))
        self.codes.append(codes)
        return graph.op("Mul", [self._float(codes, name), flat], name=name)

    def _read(self, codes: ir.Value, layer: int, part: str) -> ir.Value:
        """The filled part of the cache in float32: ``[batch, kv_heads, filled, head_size]``."""
        name = f"model.layers.{layer}.self_attn.{part}s"
        start, axis = self._shape("kv_start", 0), self._shape("kv_axis", 2)
        filled = self._graph.op("Slice", [codes, start, self._filled, axis], name=name)
        return self._graph.op("Mul", [self._float(filled, name), self._scale(layer, part)], name=name)

    def _float(self, codes: ir.Value, name: str) -> ir.Value:
        return self._graph.op("Cast", [codes], {"to": ir.DataType.FLOAT}, name=name)

    def _scale(self, layer: int, part: str) -> ir.Value:
        return self._graph.initializers.given(kv_scale_name(layer, part))

    def _shape(self, name: str, *lengths: int) -> ir.Value:
        return self._graph.initializers.constant(name, np.array(lengths, dtype=np.int64))
