"""The decoder in ONNX Runtime's operators: GroupQueryAttention, MatMulNBits and fused norms.

The graph follows the contract in ``docs/model-folder.md``: input and output names are those of
optimum and onnxruntime-genai. ``logits_start`` is an initializer that is also an input: programs
that do not know it get logits for every position, qrun asks for the last one with -1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from qconvert.formats.recipe import BlockFormat, Recipe
from qconvert.formats.stored import joined_name, kv_scale_name, layout_of
from qconvert.lowering.initializers import Initializers, PackedValues
from qconvert.lowering.ort import residual, shortlist
from qconvert.lowering.ort.graph import CONTRIB, IR_TYPES, IR_VERSION, OPSET, OrtGraph, value
from qconvert.lowering.ort.grouped import GroupedAttention, chooses_attention, has_groups
from qconvert.lowering.ort.rounded_kv import RoundedKV
from qconvert.models.spec import DecoderSpec

# Weights of the head that are multiplied at once: a fifth of a 0.5B model's.
_HEAD_PART = 1 << 25
_INT64_MAX = np.iinfo(np.int64).max


class OnnxRuntimeLowering:
    """Builds one ONNX graph for ONNX Runtime; see ``decoder.Lowering`` for the verbs.

    Args:
        spec: the decoder's sizes.
        recipe: what becomes of its weights, and of keys and values.
        initializers: where they are kept.
        rope: tables of cosines and sines ``[positions, head_size / 2]``.
        prompts: the graph fills the KV cache of the graph that decodes, and has no logits.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        recipe: Recipe,
        initializers: Initializers,
        rope: tuple[NDArray[np.float32], NDArray[np.float32]],
        *,
        prompts: bool = False,
    ) -> None:
        self._spec = spec
        self._recipe = recipe
        self.graph = OrtGraph(recipe, initializers)
        self._op, self._constant = self.graph.op, self.graph.constant
        self._initializers, self._dtype = initializers, self.graph.torch_dtype
        self._tied: PackedValues | None = None
        self._ordered: dict[tuple[ir.Value, str], ir.Value] = {}

        self._input_ids = value("input_ids", ir.DataType.INT64, "batch", "sequence")
        self._mask = value("attention_mask", ir.DataType.INT64, "batch", "total_sequence")
        self._past = self._kv_values("past_key_values", "past_sequence")
        self._present = self._kv_values("present", "total_sequence")
        self._logits: ir.Value | None = None
        self._logits_start = self._constant("logits_start", [0])
        last, self._total_minus_one, self._total = self._sequence_lengths()
        self._cos, self._sin = (
            initializers.table(name, torch.from_numpy(table).to(self._dtype))
            for name, table in zip(("cos_cache", "sin_cache"), rope)
        )
        self._rounded_kv: RoundedKV | None = None
        if prompts and recipe.kv_cache is not None:
            self._rounded_kv = RoundedKV(
                self.graph,
                spec,
                inputs=(self._input_ids, self._mask),
                lengths=(self._total_minus_one, self._total),
                rope=(self._cos, self._sin),
            )
        self._grouped: GroupedAttention | None = None
        if not prompts and chooses_attention(spec, recipe):
            self._grouped = GroupedAttention(
                self.graph, spec, past=self._past[0], last=last, rope=(self._cos, self._sin)
            )

    # The verbs.

    def embed(self, weight: str) -> ir.Value:
        kept = self._recipe.kept.get(weight)
        looked_up = kept is not None and kept.order is None and kept.fmt.symmetric and kept.fmt.bits == 8
        head = kept.fmt if kept is not None and looked_up else self._recipe.head
        if head is None:
            table = self._initializers.dense([weight], self._dtype)
            hidden = self._op("Gather", [table, self._input_ids], name=weight)
        else:
            tied = self._spec.tie_word_embeddings
            head = head if tied else replace(head, halves=False)
            packed = self._initializers.packed([weight], layout_of(head))
            self._tied = packed if tied else None
            if head.halves:
                return shortlist.look_up(self.graph, packed, self._input_ids, head.block_size, weight)
            hidden = self._op(
                "GatherBlockQuantized",
                [self._initializers.flat_view(packed), self._input_ids, self.graph.scales(packed, weight)],
                {"bits": head.bits, "block_size": head.block_size, "gather_axis": 0, "quantize_axis": 1},
                domain=CONTRIB,
                name=weight,
            )
        return hidden

    def add_and_norm(
        self, residual: ir.Value, delta: ir.Value | None, weight: str
    ) -> tuple[ir.Value, ir.Value]:
        scale = self._initializers.dense([weight], self._dtype)
        epsilon = {"epsilon": self._spec.rms_norm_eps}
        if delta is None:
            norm = self._op(
                "SimplifiedLayerNormalization", [residual, scale], epsilon | {"axis": -1}, name=weight
            )
            return residual, norm
        norm, _, _, total = self.graph.ops(
            "SkipSimplifiedLayerNormalization",
            [delta, residual, scale],
            epsilon,
            4,
            domain=CONTRIB,
            name=weight,
        )
        return total, norm

    def linear(self, hidden: ir.Value, weights: Sequence[str], biases: Sequence[str] = ()) -> ir.Value:
        bias = self._initializers.dense(biases, self._dtype) if biases else None
        name = joined_name(weights)
        if len({self._recipe.kept.get(weight) for weight in weights}) > 1:
            # The checkpoint holds them in different ways: they cannot stand side by side in one matrix.
            parts = [self.linear(hidden, [weight]) for weight in weights]
            product = self._op("Concat", parts, {"axis": -1}, name=name)
        else:
            fmt = self._recipe.format_of(weights[0])
            if fmt is not None:
                ordered = self._in_order(hidden, weights[0])
                packed = self._initializers.packed(weights, layout_of(fmt))
                return self.graph.multiply_packed(ordered, packed, fmt, bias, name)
            product = self.graph.multiply_dense(hidden, self._initializers.dense(weights, self._dtype), name)
        return product if bias is None else self._op("Add", [product, bias], name=joined_name(biases))

    def norm_heads(self, qkv: ir.Value, query_weight: str, key_weight: str) -> ir.Value:
        spec, name = self._spec, joined_name([query_weight, key_weight])
        sizes = self._constant("qkv_sizes", [spec.query_size, spec.kv_size, spec.kv_size])
        query, key, value = self.graph.ops("Split", [qkv, sizes], {"axis": -1}, 3, name=name)
        norms = [
            self._norm_of_heads(states, heads, weight)
            for states, heads, weight in (
                (query, spec.num_attention_heads, query_weight),
                (key, spec.num_key_value_heads, key_weight),
            )
        ]
        return self._op("Concat", [*norms, value], {"axis": -1}, name=name)

    def attention(self, qkv: ir.Value, layer: int) -> ir.Value:
        spec = self._spec
        attributes: dict[str, Any] = {
            "num_heads": spec.num_attention_heads,
            "kv_num_heads": spec.num_key_value_heads,
            "scale": spec.head_size**-0.5,
            "do_rotary": 1,
        }
        window = spec.sliding_windows[layer]
        if window is not None:
            attributes["local_window_size"] = window
        name = f"model.layers.{layer}.self_attn.attention"
        past, present = self._past[2 * layer : 2 * layer + 2], self._present[2 * layer : 2 * layer + 2]
        if self._rounded_kv is not None:
            return self._rounded_kv.attention(qkv, past, layer, attributes)
        context = ir.Value(name=f"{name}.context", type=ir.TensorType(self.graph.dtype))
        inputs = [qkv, None, None, *past, self._total_minus_one, self._total, self._cos, self._sin]
        if self._recipe.kv_cache is not None:
            attributes |= {
                "kv_cache_bit_width": 8,
                "k_quant_type": "PER_CHANNEL",
                "v_quant_type": "PER_CHANNEL",
            }
            scales = [self._initializers.given(kv_scale_name(layer, part)) for part in ("key", "value")]
            inputs += [None, None, None, *scales]

        def whole(outputs: list[ir.Value]) -> None:
            self.graph.nodes.add(
                "GroupQueryAttention", inputs, outputs, attributes, domain=CONTRIB, name=name
            )

        outputs = [context, *present]
        if self._grouped is not None and has_groups(spec, layer):
            self._grouped.either(qkv, past, layer, whole, outputs)
        else:
            whole(outputs)
        return context

    def gated_silu(self, gate: ir.Value, up: ir.Value) -> ir.Value:
        return self._op("Mul", [self._op("QuickGelu", [gate], {"alpha": 1.0}, domain=CONTRIB), up])

    def requested_positions(self, hidden: ir.Value) -> ir.Value:
        end, axis = self._constant("positions_end", [_INT64_MAX]), self._constant("positions_axis", [1])
        return self._op("Slice", [hidden, self._logits_start, end, axis])

    def head(self, hidden: ir.Value, weight: str) -> None:
        kept = self._recipe.kept.get(weight)
        fmt = self._recipe.head if kept is None else kept.fmt
        if fmt is None:
            logits = self.graph.multiply_dense(
                hidden, self._initializers.dense([weight], self._dtype), "lm_head.weight"
            )
        else:
            hidden = self._in_order(hidden, weight)
            packed = self._tied or self._initializers.packed([weight], layout_of(fmt))
            if self._recipe.shortlist is not None:
                logits = shortlist.multiply(self.graph, hidden, packed, fmt, self._recipe.shortlist)
            elif self._recipe.head_residual:
                logits = residual.multiply(
                    self.graph, hidden, packed, fmt, lambda rows: self._multiply_head(rows, packed, fmt)
                )
            else:
                logits = self._multiply_head(hidden, packed, fmt)
        if self.graph.dtype != ir.DataType.FLOAT:
            logits = self._op("Cast", [logits], {"to": ir.DataType.FLOAT})
        logits.name, logits.type = "logits", ir.TensorType(ir.DataType.FLOAT)
        logits.shape = ir.Shape(("batch", "logits_sequence", self._spec.vocab_size))
        self._logits = logits

    def model(self, name: str) -> ir.Model:
        """The finished graph; its large initializers point into the data file.

        Without a head its outputs are keys and values alone.
        """
        inputs = [self._input_ids, self._mask, *self._past]
        outputs = self._present if self._rounded_kv is None else self._rounded_kv.codes
        if self._logits is not None:
            inputs, outputs = [*inputs, self._logits_start], [self._logits, *outputs]
            if self._grouped is not None:
                inputs.append(self._grouped.wanted)
        graph = ir.Graph(
            inputs,
            outputs,
            nodes=self.graph.nodes.all,
            initializers=self._initializers.values,
            opset_imports={"": OPSET, CONTRIB: 1},
            name=name,
        )
        model = ir.Model(graph, ir_version=IR_VERSION, producer_name="qconvert")
        if self._logits is None:  # a graph for prompts does not use all that was described
            RemoveUnusedNodesPass()(model)
        return model

    # Helpers of the verbs.

    def _in_order(self, hidden: ir.Value, weight: str) -> ir.Value:
        """The features in the order in which a matrix's columns are stored; one Gather for each order."""
        kept = self._recipe.kept.get(weight)
        if kept is None or kept.order is None:
            return hidden
        if (hidden, kept.order) not in self._ordered:
            order = self._initializers.order(kept.order, weight)
            self._ordered[hidden, kept.order] = self._op("Gather", [hidden, order], {"axis": -1}, name=weight)
        return self._ordered[hidden, kept.order]

    def _norm_of_heads(self, states: ir.Value, heads: int, weight: str) -> ir.Value:
        """``[batch, seq, heads x head_size]``, each head normed by itself."""
        # No length may be inferred (-1): where no position is asked for, the tensor is empty.
        split = self._constant(f"{heads}_heads", [0, 0, heads, self._spec.head_size])
        whole = self._constant(f"{heads}_heads_whole", [0, 0, heads * self._spec.head_size])
        norm = self._op(
            "SimplifiedLayerNormalization",
            [
                self._op("Reshape", [states, split], name=weight),
                self._initializers.dense([weight], self._dtype),
            ],
            {"epsilon": self._spec.rms_norm_eps, "axis": -1},
            name=weight,
        )
        return self._op("Reshape", [norm, whole], name=weight)

    def _multiply_head(self, hidden: ir.Value, packed: PackedValues, fmt: BlockFormat) -> ir.Value:
        """The head's product in parts: while ONNX Runtime rearranges a matrix, it holds it twice."""
        parts = -(-packed.rows * packed.columns // _HEAD_PART)
        if parts == 1:
            return self.graph.multiply_packed(hidden, packed, fmt, None, "lm_head.weight")
        products = [
            self.graph.multiply_packed(hidden, part, fmt, None, "lm_head.weight")
            for part in self._initializers.row_parts(packed, parts)
        ]
        return self._op("Concat", products, {"axis": -1}, name="lm_head.weight")

    def _sequence_lengths(self) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Each row's tokens less one ``[batch]``, int64 and int32, and those of the longest, int32."""
        axis = self._constant("mask_axis", [1])
        rows = self._op("ReduceSum", [self._mask, axis], {"keepdims": 0})
        less_one = self._op("Sub", [rows, self._constant("one", [1])])
        longest = self._op("Gather", [self._op("Shape", [self._mask]), self._constant("mask_axis_scalar", 1)])
        to_int32 = {"to": ir.DataType.INT32}
        return less_one, self._op("Cast", [less_one], to_int32), self._op("Cast", [longest], to_int32)

    def _kv_values(self, prefix: str, length: str) -> list[ir.Value]:
        spec = self._spec
        return [
            value(
                f"{prefix}.{layer}.{part}",
                IR_TYPES[self._recipe.kv_dtype],
                "batch",
                spec.num_key_value_heads,
                length,
                spec.head_size,
            )
            for layer in range(spec.num_hidden_layers)
            for part in ("key", "value")
        ]
