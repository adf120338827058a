"""The decoder with integer products: int8 weights, activations of 8 bits with one scale per token.

Around each ``MatMulIntegerToFloat``: s = max|x| of every token, x / s is rounded to 127ths, and the
product is multiplied by s. The scale of ``up_proj`` is multiplied in only after ``down_proj``, whose sums
over many channels leave far fewer values. These channels come in parts that stay in the processor's cache,
and each part in groups with scales of their own. All else (norms, attention, embedding, head) is as in
``decoder.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from qconvert.formats.channels import channel_layout, groups_in_a_part
from qconvert.formats.recipe import ChannelFormat, Recipe
from qconvert.formats.stored import joined_name
from qconvert.lowering.initializers import Initializers, PackedValues
from qconvert.lowering.ort.decoder import OnnxRuntimeLowering
from qconvert.lowering.ort.graph import CONTRIB
from qconvert.lowering.ort.residual import ONE_127TH, SMALLEST
from qconvert.models.spec import DecoderSpec

_ZERO_POINT = 128


@dataclass(frozen=True)
class Activation:
    """Features ``[batch, seq, ..]`` in one or more parts side by side.

    ``scale`` ``[batch, seq, 1]`` is a factor by which all parts are still to be multiplied, or None.
    """

    parts: tuple[ir.Value, ...]
    scale: ir.Value | None = None


@dataclass(frozen=True)
class _Quantised:
    """uint8 features, 127ths around a zero point of 128; the scale ``[batch, seq, 1]`` of each token."""

    data: ir.Value
    scale: ir.Value


class IntegerLowering:
    """Builds one graph of integer products for ONNX Runtime; see ``decoder.Lowering`` for the verbs."""

    def __init__(
        self,
        spec: DecoderSpec,
        recipe: Recipe,
        fmt: ChannelFormat,
        initializers: Initializers,
        rope: tuple[NDArray[np.float32], NDArray[np.float32]],
        *,
        prompts: bool = False,
    ) -> None:
        self._floats = OnnxRuntimeLowering(spec, recipe, initializers, rope, prompts=prompts)
        self._graph = self._floats.graph
        self._spec = spec
        self._fmt = fmt
        self._groups = groups_in_a_part(spec.intermediate_size, fmt)
        self._initializers = initializers
        self._quantised: dict[ir.Value, _Quantised] = {}

    # The verbs.

    def embed(self, weight: str) -> Activation:
        return Activation((self._floats.embed(weight),))

    def add_and_norm(
        self, residual: Activation, delta: Activation | None, weight: str
    ) -> tuple[Activation, Activation]:
        values = self._floats.add_and_norm(
            self._whole(residual), None if delta is None else self._whole(delta), weight
        )
        total, norm = (Activation((value,)) for value in values)
        return total, norm

    def linear(self, hidden: Activation, weights: Sequence[str], biases: Sequence[str] = ()) -> Activation:
        if len(hidden.parts) > 1:
            assert len(weights) == 1, "only down_proj has its input in parts"
            assert not biases, "only down_proj has its input in parts"
            return self._sum_of_parts(hidden, weights[0])
        name = joined_name(weights)
        data = self._quantise(hidden.parts[0], name)
        packed = self._packed(weights)
        products = tuple(
            self._product(data, weight, scales, name)
            for weight, scales in zip(packed.all("data"), packed.all("scales"))
        )
        result = Activation(products, self._times(data.scale, hidden.scale, name))
        if not biases:
            return result
        bias = self._initializers.dense(biases, torch.float32)
        return Activation((self._op("Add", [self._whole(result), bias], joined_name(biases)),))

    def norm_heads(self, qkv: Activation, query_weight: str, key_weight: str) -> Activation:
        return Activation((self._floats.norm_heads(self._whole(qkv), query_weight, key_weight),))

    def attention(self, qkv: Activation, layer: int) -> Activation:
        return Activation((self._floats.attention(self._whole(qkv), layer),))

    def gated_silu(self, gate: Activation, up: Activation) -> Activation:
        assert gate.scale is not None, "a product's scale is still to be applied"
        parts = tuple(
            self._floats.gated_silu(self._op("Mul", [gated, gate.scale]), other)
            for gated, other in zip(gate.parts, up.parts)
        )
        return Activation(parts, up.scale)

    def requested_positions(self, hidden: Activation) -> Activation:
        return Activation((self._floats.requested_positions(self._whole(hidden)),))

    def head(self, hidden: Activation, weight: str) -> None:
        self._floats.head(self._whole(hidden), weight)

    def model(self, name: str) -> ir.Model:
        """The finished graph; without a head its only outputs are keys and values."""
        return self._floats.model(name)

    # Helpers of the verbs.

    def _packed(self, weights: Sequence[str]) -> PackedValues:
        layout = channel_layout(weights[0], self._spec.intermediate_size, self._fmt)
        return self._initializers.packed(weights, layout)

    def _sum_of_parts(self, hidden: Activation, weight: str) -> Activation:
        packed = self._packed([weight])
        groups = (group for part in hidden.parts for group in self._quantise_groups(part, weight))
        total: ir.Value | None = None
        for data, matrix, scales in zip(groups, packed.all("data"), packed.all("scales"), strict=True):
            product = self._op("Mul", [self._product(data, matrix, scales, weight), data.scale], weight)
            total = product if total is None else self._op("Add", [total, product], weight)
        assert total is not None
        if self._groups > 1:
            shape = self._shape("features", 0, 0, self._spec.hidden_size)
            total = self._op("Reshape", [total, shape], weight)
        return Activation((total,), hidden.scale)

    def _quantise_groups(self, part: ir.Value, name: str) -> list[_Quantised]:
        """A part of the features by group, each ``[batch, seq, 1, features]`` with a scale of its own."""
        if self._groups == 1:
            return [self._quantise(part, name)]
        # No length may be inferred (-1): where no position's logits are wanted, the tensor is empty.
        width = self._spec.intermediate_size // (self._fmt.mlp_parts * self._groups)
        shape = self._shape("groups", 0, 0, self._groups, width)
        both = self._quantise(self._op("Reshape", [part, shape], name), name)
        split = {"axis": 2, "num_outputs": self._groups}
        data, scales = (
            self._graph.ops("Split", [value], split, self._groups, name=name)
            for value in (both.data, both.scale)
        )
        return [_Quantised(*group) for group in zip(data, scales)]

    def _whole(self, hidden: Activation) -> ir.Value:
        """The features as one value with every factor applied."""
        assert len(hidden.parts) == 1, "parts are added up in down_proj, and go nowhere else"
        value = hidden.parts[0]
        return value if hidden.scale is None else self._op("Mul", [value, hidden.scale])

    def _quantise(self, value: ir.Value, name: str) -> _Quantised:
        if value not in self._quantised:  # gate_proj and up_proj read the same features
            largest = self._op("ReduceMax", [self._op("Abs", [value], name), self._axis()], name)
            scale = self._op("Max", [largest, self._number("smallest_scale", SMALLEST)], name)
            data = self._op(
                "QuantizeLinear",
                [self._op("Div", [value, scale], name), self._step(), self._zero_point()],
                name,
            )
            self._quantised[value] = _Quantised(data, scale)
        return self._quantised[value]

    def _product(self, hidden: _Quantised, weight: ir.Value, scales: ir.Value, name: str) -> ir.Value:
        inputs = [hidden.data, weight, self._step(), scales, self._zero_point()]
        return self._graph.op("MatMulIntegerToFloat", inputs, domain=CONTRIB, name=name)

    def _times(self, scale: ir.Value, other: ir.Value | None, name: str) -> ir.Value:
        return scale if other is None else self._op("Mul", [scale, other], name)

    def _step(self) -> ir.Value:
        return self._number("one_127th", ONE_127TH)

    def _zero_point(self) -> ir.Value:
        return self._number("activation_zero_point", np.uint8(_ZERO_POINT))

    def _shape(self, name: str, *lengths: int) -> ir.Value:
        return self._initializers.constant(f"{name}_shape", np.array(lengths, dtype=np.int64))

    def _axis(self) -> ir.Value:
        return self._initializers.constant("features_axis", np.array([-1], dtype=np.int64))

    def _number(self, name: str, value: np.generic) -> ir.Value:
        return self._initializers.constant(name, np.asarray(value))

    def _op(self, op_type: str, inputs: Sequence[ir.Value | None], name: str = "") -> ir.Value:
        return self._graph.op(op_type, inputs, name=name)
