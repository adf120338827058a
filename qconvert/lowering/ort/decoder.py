"""The decoder in ONNX Runtime's operators: GroupQueryAttention, MatMulNBits and fused norms.

The graph follows the contract in ``docs/model-folder.md``: input and output names are those of
optimum and onnxruntime-genai. ``logits_start`` is an initializer that is also an input: programs
that do not know it get logits for every position, qrun asks for the last one with -1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from qconvert.formats.recipe import BlockFormat, Recipe
from qconvert.formats.stored import joined_name, kv_scale_name
from qconvert.lowering.initializers import Initializers, PackedValues
from qconvert.lowering.nodes import Nodes
from qconvert.lowering.ort import shortlist
from qconvert.lowering.ort.rounded_kv import RoundedKV
from qconvert.models.decoder import DecoderSpec

OPSET = 21
IR_VERSION = 10
CONTRIB = "com.microsoft"
# Weights of the head that are multiplied at once: a fifth of a 0.5B model's.
_HEAD_PART = 1 << 25
_IR_TYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "int8": ir.DataType.INT8}
_INT64_MAX = np.iinfo(np.int64).max


class OnnxRuntimeLowering:
    """Builds one ONNX graph for ONNX Runtime; see ``decoder.Lowering`` for the verbs.

    Args:
        spec: the decoder's sizes.
        recipe: what becomes of its weights, and of keys and values.
        initializers: where they are kept.
        rope: tables of cosines and sines ``[positions, head_size / 2]``.
        prompts: the graph fills another one's KV cache and has no logits.
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
        self.initializers = initializers
        self._dtype = {"float32": torch.float32, "float16": torch.float16}[recipe.activations]
        self.dtype = _IR_TYPES[recipe.activations]
        self._nodes = Nodes()
        self._tied: PackedValues | None = None
        self._cast_scales: dict[ir.Value, ir.Value] = {}

        self._input_ids = _value("input_ids", ir.DataType.INT64, "batch", "sequence")
        self._mask = _value("attention_mask", ir.DataType.INT64, "batch", "total_sequence")
        self._past = self._kv_values("past_key_values", "past_sequence")
        self._present = self._kv_values("present", "total_sequence")
        self._logits: ir.Value | None = None
        self._logits_start = self._constant("logits_start", [0])
        self._total_minus_one, self._total = self._sequence_lengths()
        self._cos, self._sin = (
            initializers.table(name, torch.from_numpy(table).to(self._dtype))
            for name, table in zip(("cos_cache", "sin_cache"), rope)
        )
        self._rounded_kv: RoundedKV | None = None
        if prompts and recipe.kv_cache is not None:
            self._rounded_kv = RoundedKV(
                self,
                spec,
                inputs=(self._input_ids, self._mask),
                lengths=(self._total_minus_one, self._total),
                rope=(self._cos, self._sin),
            )

    # The verbs.

    def embed(self, weight: str) -> ir.Value:
        head = self._recipe.head
        if head is None:
            table = self.initializers.dense([weight], self._dtype)
            hidden = self.op("Gather", [table, self._input_ids], name=weight)
        else:
            tied = self._spec.tie_word_embeddings
            head = head if tied else replace(head, halves=False)
            packed = self.initializers.packed([weight], head)
            self._tied = packed if tied else None
            if head.halves:
                return shortlist.look_up(self, packed, self._input_ids, head.block_size, weight)
            hidden = self.op(
                "GatherBlockQuantized",
                [self.initializers.flat_view(packed), self._input_ids, self.scales(packed, weight)],
                {"bits": head.bits, "block_size": head.block_size, "gather_axis": 0, "quantize_axis": 1},
                domain=CONTRIB,
                name=weight,
            )
        return hidden

    def add_and_norm(
        self, residual: ir.Value, delta: ir.Value | None, weight: str
    ) -> tuple[ir.Value, ir.Value]:
        scale = self.initializers.dense([weight], self._dtype)
        epsilon = {"epsilon": self._spec.rms_norm_eps}
        if delta is None:
            norm = self.op(
                "SimplifiedLayerNormalization", [residual, scale], epsilon | {"axis": -1}, name=weight
            )
            return residual, norm
        norm, _, _, total = self.ops(
            "SkipSimplifiedLayerNormalization",
            [delta, residual, scale],
            epsilon,
            4,
            domain=CONTRIB,
            name=weight,
        )
        return total, norm

    def linear(self, hidden: ir.Value, weights: Sequence[str], biases: Sequence[str] = ()) -> ir.Value:
        bias = self.initializers.dense(biases, self._dtype) if biases else None
        name = joined_name(weights)
        fmt = self._recipe.format_of(weights[0])
        if fmt is not None:
            return self.multiply_packed(hidden, self.initializers.packed(weights, fmt), fmt, bias, name)
        product = self._multiply_dense(hidden, self.initializers.dense(weights, self._dtype), name)
        return product if bias is None else self.op("Add", [product, bias], name=joined_name(biases))

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
        context = ir.Value(name=f"{name}.context")
        inputs = [qkv, None, None, *past, self._total_minus_one, self._total, self._cos, self._sin]
        if self._recipe.kv_cache is not None:
            attributes |= {
                "kv_cache_bit_width": 8,
                "k_quant_type": "PER_CHANNEL",
                "v_quant_type": "PER_CHANNEL",
            }
            scales = [self.initializers.given(kv_scale_name(layer, part)) for part in ("key", "value")]
            inputs += [None, None, None, *scales]
        self._nodes.add(
            "GroupQueryAttention", inputs, [context, *present], attributes, domain=CONTRIB, name=name
        )
        return context

    def gated_silu(self, gate: ir.Value, up: ir.Value) -> ir.Value:
        return self.op("Mul", [self.op("QuickGelu", [gate], {"alpha": 1.0}, domain=CONTRIB), up])

    def requested_positions(self, hidden: ir.Value) -> ir.Value:
        end, axis = self._constant("positions_end", [_INT64_MAX]), self._constant("positions_axis", [1])
        return self.op("Slice", [hidden, self._logits_start, end, axis])

    def head(self, hidden: ir.Value, weight: str) -> None:
        fmt = self._recipe.head
        if fmt is None:
            logits = self._multiply_dense(
                hidden, self.initializers.dense([weight], self._dtype), "lm_head.weight"
            )
        else:
            packed = self._tied or self.initializers.packed([weight], fmt)
            if self._recipe.shortlist is None:
                logits = self._multiply_head(hidden, packed, fmt)
            else:
                logits = shortlist.multiply(self, hidden, packed, fmt, self._recipe.shortlist)
        if self.dtype != ir.DataType.FLOAT:
            logits = self.op("Cast", [logits], {"to": ir.DataType.FLOAT})
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
        graph = ir.Graph(
            inputs,
            outputs,
            nodes=self._nodes.all,
            initializers=self.initializers.values,
            opset_imports={"": OPSET, CONTRIB: 1},
            name=name,
        )
        model = ir.Model(graph, ir_version=IR_VERSION, producer_name="qconvert")
        if self._logits is None:  # the graph beside it has more than this one needs
            RemoveUnusedNodesPass()(model)
        return model

    # Pieces of them.

    def _multiply_dense(self, hidden: ir.Value, weight: ir.Value, name: str) -> ir.Value:
        # Weights stay [out, in] as in the checkpoint, so that a tied embedding serves as the head too.
        return self.op("FusedMatMul", [hidden, weight], {"transB": 1}, domain=CONTRIB, name=name)

    def multiply_packed(
        self, hidden: ir.Value, weight: PackedValues, fmt: BlockFormat, bias: ir.Value | None, name: str
    ) -> ir.Value:
        attributes = {
            "K": weight.columns,
            "N": weight.rows,
            "bits": fmt.bits,
            "block_size": fmt.block_size,
            "accuracy_level": self._recipe.accuracy_level,
        }
        inputs = [hidden, weight.data, self.scales(weight, name), weight.zero_points, None, bias]
        while inputs[-1] is None:
            inputs.pop()
        return self.op("MatMulNBits", inputs, attributes, domain=CONTRIB, name=name)

    def scales(self, weight: PackedValues, name: str) -> ir.Value:
        """Scales in the activations' type: ONNX Runtime folds the cast away when it loads the model."""
        if weight.scales.dtype == self.dtype:
            return weight.scales
        if weight.scales not in self._cast_scales:  # a tied embedding's serve twice
            cast = self.op("Cast", [weight.scales], {"to": self.dtype}, name=name)
            self._cast_scales[weight.scales] = cast
        return self._cast_scales[weight.scales]

    def _multiply_head(self, hidden: ir.Value, packed: PackedValues, fmt: BlockFormat) -> ir.Value:
        """The largest product in parts: ONNX Runtime arranges one part's weights anew while it holds two."""
        parts = -(-packed.rows * packed.columns // _HEAD_PART)
        if parts == 1:
            return self.multiply_packed(hidden, packed, fmt, None, "lm_head.weight")
        products = [
            self.multiply_packed(hidden, part, fmt, None, "lm_head.weight")
            for part in self.initializers.row_parts(packed, parts)
        ]
        return self.op("Concat", products, {"axis": -1}, name="lm_head.weight")

    def _sequence_lengths(self) -> tuple[ir.Value, ir.Value]:
        """What GroupQueryAttention wants: tokens of each row less one [batch], and the longest row's."""
        axis = self._constant("mask_axis", [1])
        rows = self.op("ReduceSum", [self._mask, axis], {"keepdims": 0})
        less_one = self.op("Sub", [rows, self._constant("one", [1])])
        longest = self.op("Gather", [self.op("Shape", [self._mask]), self._constant("mask_axis_scalar", 1)])
        to_int32 = {"to": ir.DataType.INT32}
        return self.op("Cast", [less_one], to_int32), self.op("Cast", [longest], to_int32)

    def _kv_values(self, prefix: str, length: str) -> list[ir.Value]:
        spec = self._spec
        return [
            _value(
                f"{prefix}.{layer}.{part}",
                _IR_TYPES[self._recipe.kv_dtype],
                "batch",
                spec.num_key_value_heads,
                length,
                spec.head_size,
            )
            for layer in range(spec.num_hidden_layers)
            for part in ("key", "value")
        ]

    def _constant(self, name: str, value: int | list[int]) -> ir.Value:
        return self.initializers.constant(name, np.array(value, dtype=np.int64))

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        domain: str = "",
        name: str = "",
    ) -> ir.Value:
        return self.ops(op_type, inputs, attributes, 1, domain=domain, name=name)[0]

    def ops(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None,
        num_outputs: int,
        *,
        domain: str = "",
        name: str = "",
    ) -> Sequence[ir.Value]:
        return self._nodes.ops(op_type, inputs, [None] * num_outputs, attributes, domain=domain, name=name)


def _value(name: str, dtype: ir.DataType, *shape: int | str) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
