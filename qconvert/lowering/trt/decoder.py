"""The decoder in standard ONNX operators with a static KV cache: what TensorRT's parser takes.

Half types (bfloat16, float16) stand where the bytes are: weights, operands of products, attention and
the KV cache. Everything element by element is float32: the residual stream, norms, biases, rotary
positions, the MLP's gate and the logits. Qwen2's residual stream grows into the thousands, where
bfloat16 keeps three digits and float16 ends at 65,504.

Embedding and head are float16 even where the rest is bfloat16: a normed vector and its logits are small,
and float16 has eight times finer steps at the same bytes. On the sample that halves the KL divergence,
and is as good as a float32 head, for which TensorRT keeps a second copy of the weights.

Attention has two spellings, chosen in one place (``_attend``): ``standard`` with an explicit mask, which
ONNX Runtime's CPU provider can run too, and ``trt`` with TensorRT's own operator. That one knows how far the
cache is filled, so that a decode step does not pay for all of it. The rest of the graph is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from qconvert.formats.columns import Int4Columns
from qconvert.formats.recipe import ChannelFormat, Recipe
from qconvert.formats.stored import joined_name
from qconvert.lowering.initializers import Initializers
from qconvert.lowering.nodes import Nodes
from qconvert.models.spec import DecoderSpec

Spelling = Literal["standard", "trt"]
SPELLINGS: tuple[Spelling, ...] = ("standard", "trt")
OPSET = 24  # TensorScatter; RMSNormalization and RotaryEmbedding came with 23
IR_VERSION = 11
# The name under which TensorRT's parser knows its own operators: any domain that ONNX does not use.
TRT_DOMAIN = "trt"

_FLOAT, _INT64, _INT32, _BOOL = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL
_ACTIVATIONS = {
    "float32": (torch.float32, _FLOAT),
    "float16": (torch.float16, ir.DataType.FLOAT16),
    "bfloat16": (torch.bfloat16, ir.DataType.BFLOAT16),
}


class TensorRTLowering:
    """Builds one ONNX graph for TensorRT; see ``decoder.Lowering`` for the verbs.

    Inputs: ``input_ids`` and ``position_ids`` int64 [batch, sequence] (consecutive in each row),
    ``logits_positions`` int64 [positions], and past_key_values [batch, kv_heads, length, head_size] with the
    static length ``spec.context_length``. Outputs: ``logits`` float32 [batch, positions, vocab] and present,
    which are the past's own buffers after the new tokens were written at their positions.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        recipe: Recipe,
        initializers: Initializers,
        rope: tuple[NDArray[np.float32], NDArray[np.float32]],
        spelling: Spelling,
    ) -> None:
        self._spec = spec
        self._recipe = recipe
        self._initializers = initializers
        self._spelling = spelling
        self._dtype, self._half = _ACTIVATIONS[recipe.activations]
        self._nodes = Nodes()
        self._op = self._nodes.op

        self._input_ids = _value("input_ids", _INT64, "batch", "sequence")
        self._position_ids = _value("position_ids", _INT64, "batch", "sequence")
        self._logits_positions = _value("logits_positions", _INT64, "positions")
        self._past = self._kv_values("past_key_values")
        self._present = self._kv_values("present")
        self._logits: ir.Value | None = None
        self._cos, self._sin = (
            initializers.table(name, torch.from_numpy(table))
            for name, table in zip(("cos_cache", "sin_cache"), rope)
        )
        self._scale = self._constant("attention_scale", np.float32(spec.head_size**-0.5))
        self._start = self._op(
            "Gather", [self._position_ids, self._constant("first", 0)], _INT64, {"axis": 1}, name="start"
        )
        self._head_dtype, self._head_type = _ACTIVATIONS[
            "float32" if recipe.activations == "float32" else "float16"
        ]
        self._masks: dict[int | None, ir.Value] = {}
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self._filled: ir.Value | None = None

    # The verbs.

    def embed(self, weight: str) -> ir.Value:
        table = self._initializers.dense([weight], self._head_dtype)
        rows = self._op("Gather", [table, self._input_ids], self._head_type, name=weight)
        return self._cast(rows, _FLOAT)

    def add_and_norm(
        self, residual: ir.Value, delta: ir.Value | None, weight: str
    ) -> tuple[ir.Value, ir.Value]:
        if delta is not None:
            residual = self._op("Add", [residual, delta], _FLOAT, name=weight)
        scale = self._initializers.dense([weight], torch.float32)
        attributes = {"axis": -1, "epsilon": self._spec.rms_norm_eps}
        return residual, self._op("RMSNormalization", [residual, scale], _FLOAT, attributes, name=weight)

    def linear(self, hidden: ir.Value, weights: Sequence[str], biases: Sequence[str] = ()) -> ir.Value:
        name = joined_name(weights)
        operands = [self._cast(hidden, self._half), self._matrix(weights, name)]
        product = self._cast(self._op("MatMul", operands, self._half, name=name), _FLOAT)
        if not biases:
            return product
        bias = self._initializers.dense(biases, torch.float32)
        return self._op("Add", [product, bias], _FLOAT, name=joined_name(biases))

    def norm_heads(self, qkv: ir.Value, query_weight: str, key_weight: str) -> ir.Value:
        spec, name = self._spec, joined_name([query_weight, key_weight])
        sizes = self._constant("qkv_sizes", [spec.query_size, spec.kv_size, spec.kv_size])
        query, key, value = self._nodes.ops("Split", [qkv, sizes], [_FLOAT] * 3, {"axis": -1}, name=name)
        norms = [
            self._norm_of_heads(states, heads, weight)
            for states, heads, weight in (
                (query, spec.num_attention_heads, query_weight),
                (key, spec.num_key_value_heads, key_weight),
            )
        ]
        return self._op("Concat", [*norms, value], _FLOAT, {"axis": -1}, name=name)

    def attention(self, qkv: ir.Value, layer: int) -> ir.Value:
        spec, name = self._spec, f"model.layers.{layer}.self_attn"
        heads, kv_heads = spec.num_attention_heads, spec.num_key_value_heads
        sizes = self._constant("qkv_sizes", [spec.query_size, spec.kv_size, spec.kv_size])
        parts = self._nodes.ops("Split", [qkv, sizes], [_FLOAT] * 3, {"axis": -1}, name=name)
        query, key, value = (
            self._heads(part, count, name) for part, count in zip(parts, (heads, kv_heads, kv_heads))
        )
        # The scale is applied in float32: neither spelling's attention then scales, nor rounds twice.
        query = self._op("Mul", [self._rotate(query, name), self._scale], _FLOAT, name=name)
        query = self._cast(query, self._half)
        key, value = (
            self._write_cache(self._cast(new, self._half), 2 * layer + index, name)
            for index, new in enumerate((self._rotate(key, name), value))
        )
        context = self._attend(query, key, value, layer)
        context = self._op("Transpose", [context], self._half, {"perm": [0, 2, 1, 3]}, name=name)
        return self._op("Reshape", [context, self._constant("flat", [0, 0, -1])], self._half, name=name)

    def gated_silu(self, gate: ir.Value, up: ir.Value) -> ir.Value:
        silu = self._op("Mul", [gate, self._op("Sigmoid", [gate], _FLOAT)], _FLOAT)
        return self._op("Mul", [silu, up], _FLOAT)

    def requested_positions(self, hidden: ir.Value) -> ir.Value:
        return self._op("Gather", [hidden, self._logits_positions], _FLOAT, {"axis": 1})

    def head(self, hidden: ir.Value, weight: str) -> None:
        dense = self._initializers.dense([weight], self._head_dtype)
        matrix = self._transposed(dense, self._head_type, weight)
        operands = [self._cast(hidden, self._head_type), matrix]
        logits = self._cast(self._op("MatMul", operands, self._head_type, name="lm_head.weight"), _FLOAT)
        logits.name = "logits"
        logits.shape = ir.Shape(("batch", "positions", self._spec.vocab_size))
        self._logits = logits

    def model(self, name: str) -> ir.Model:
        """The finished graph; its large initializers point into the data file."""
        assert self._logits is not None, "the decoder has no head yet"
        nodes = self._nodes.all
        used = {value for node in nodes for value in node.inputs}
        graph = ir.Graph(
            [self._input_ids, self._position_ids, self._logits_positions, *self._past],
            [self._logits, *self._present],
            nodes=nodes,
            initializers=[value for value in self._initializers.values if value in used],
            opset_imports={"": OPSET, **({TRT_DOMAIN: 1} if self._spelling == "trt" else {})},
            name=name,
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="qconvert")

    # Helpers of the verbs.

    def _norm_of_heads(self, states: ir.Value, heads: int, weight: str) -> ir.Value:
        """``[batch, sequence, heads x head_size]``, each head normed by itself."""
        split = self._constant(f"{heads}_split_heads", [0, 0, heads, self._spec.head_size])
        norm = self._op(
            "RMSNormalization",
            [
                self._op("Reshape", [states, split], _FLOAT, name=weight),
                self._initializers.dense([weight], torch.float32),
            ],
            _FLOAT,
            {"axis": -1, "epsilon": self._spec.rms_norm_eps},
            name=weight,
        )
        return self._op("Reshape", [norm, self._constant("flat", [0, 0, -1])], _FLOAT, name=weight)

    def _attend(self, query: ir.Value, key: ir.Value, value: ir.Value, layer: int) -> ir.Value:
        """Attention over the cache in the graph's spelling; the query is scaled already."""
        window = self._spec.sliding_windows[layer]
        if window is not None and window >= self._spec.context_length:
            window = None  # the window covers the whole cache
        name = f"model.layers.{layer}.self_attn.attention"
        inputs: list[ir.Value | None]
        if self._spelling == "standard" or window is not None:
            inputs = [query, key, value, self._mask(window)]
            return self._op("Attention", inputs, self._half, {"scale": 1.0}, name=name)
        # TensorRT's operator has a causal mask but no window. It is given the number of keys only (lengths of
        # queries belong to its packed form), and then aligns the last query with the last key.
        inputs = [query, key, value, None, None, self._filled_length()]
        attributes = {"causal_kind": "lower_right"}
        return self._op("TRT_Attention", inputs, self._half, attributes, domain=TRT_DOMAIN, name=name)

    def _mask(self, window: int | None) -> ir.Value:
        """What each query sees: bool [batch, 1, sequence, length]."""
        if window not in self._masks:
            keys = self._constant("key_positions", np.arange(self._spec.context_length, dtype=np.int64))
            axes = self._constant("query_axes", [1, 3])
            queries = self._op("Unsqueeze", [self._position_ids, axes], _INT64, name="mask")
            mask = self._op("LessOrEqual", [keys, queries], _BOOL, name="mask")
            if window is not None:
                length = self._constant(f"window_{window}", window)
                first_hidden = self._op("Sub", [queries, length], _INT64, name="mask")
                in_window = self._op("Greater", [keys, first_hidden], _BOOL, name="mask")
                mask = self._op("And", [mask, in_window], _BOOL, name="mask")
            self._masks[window] = mask
        return self._masks[window]

    def _filled_length(self) -> ir.Value:
        """Tokens in each row's cache, the new ones included: int32 [batch]."""
        if self._filled is None:
            last = self._constant("last", -1)
            position = self._op("Gather", [self._position_ids, last], _INT64, {"axis": 1}, name="filled")
            filled = self._op("Add", [position, self._constant("one", 1)], _INT64, name="filled")
            self._filled = self._cast(filled, _INT32)
        return self._filled

    def _heads(self, packed: ir.Value, heads: int, name: str) -> ir.Value:
        """[batch, sequence, heads x head_size] as [batch, heads, sequence, head_size]."""
        shape = self._constant(f"{heads}_heads", [0, 0, heads, self._spec.head_size])
        split = self._op("Reshape", [packed, shape], _FLOAT, name=name)
        return self._op("Transpose", [split], _FLOAT, {"perm": [0, 2, 1, 3]}, name=name)

    def _rotate(self, heads: ir.Value, name: str) -> ir.Value:
        return self._op(
            "RotaryEmbedding", [heads, self._cos, self._sin, self._position_ids], _FLOAT, name=name
        )

    def _write_cache(self, new: ir.Value, index: int, name: str) -> ir.Value:
        """The cache with the new tokens at their positions; TensorRT writes them in place."""
        past, present = self._past[index], self._present[index]
        self._nodes.add("TensorScatter", [past, new, self._start], [present], {"axis": 2}, name=name)
        return present

    def _matrix(self, weights: Sequence[str], name: str) -> ir.Value:
        """Weights side by side as one ``[in, out]`` matrix in the half type."""
        kept = {self._recipe.kept.get(weight) for weight in weights}
        same = next(iter(kept)) if len(kept) == 1 else None
        fmt = self._recipe.linear if same is None else same.fmt
        assert not isinstance(fmt, ChannelFormat), "integer products are for ONNX Runtime"
        if fmt is None:
            return self._transposed(self._initializers.dense(weights, self._dtype), self._half, name)
        # TensorRT takes signed 4-bit values in blocks along the first axis only.
        packed = self._initializers.packed(weights, Int4Columns(fmt.block_size, self._recipe.activations))
        attributes = {"axis": 0, "block_size": fmt.block_size}
        return self._op(
            "DequantizeLinear", [packed["data"], packed["scales"]], self._half, attributes, name=name
        )

    def _transposed(self, dense: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
        # Weights stay [out, in] as in the checkpoint, so that a tied embedding serves as the head too.
        return self._op("Transpose", [dense], dtype, {"perm": [1, 0]}, name=name)

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        if value.dtype == dtype:
            return value
        if (value, dtype) not in self._casts:
            self._casts[value, dtype] = self._op("Cast", [value], dtype, {"to": dtype})
        return self._casts[value, dtype]

    def _kv_values(self, prefix: str) -> list[ir.Value]:
        spec = self._spec
        shape = ("batch", spec.num_key_value_heads, spec.context_length, spec.head_size)
        return [
            _value(f"{prefix}.{layer}.{part}", self._half, *shape)
            for layer in range(spec.num_hidden_layers)
            for part in ("key", "value")
        ]

    def _constant(self, name: str, value: Any) -> ir.Value:
        array = value if isinstance(value, np.ndarray | np.generic) else np.array(value, dtype=np.int64)
        return self._initializers.constant(name, np.asarray(array))


def _value(name: str, dtype: ir.DataType, *shape: int | str) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
