"""The sharp twin of a stored graph: the same graph, with the rounding of its activations taken out.

Eight or four bits hide small errors: an attention scale that is 5% off costs less than rounding. So the
stored graph is rewritten, operator by operator, into one that computes the same in float32, from the same
stored bytes. An error in the stored graph stays in its twin, which is then compared with PyTorch as sharply
as fp32.

1. ``MatMulNBits`` gets ``accuracy_level`` 1: products of dequantised weights in float32.
2. ``QuantizeLinear`` becomes a division that is cut off at the ends of its type, but not rounded;
   ``MatMulIntegerToFloat`` becomes a product with the dequantised matrix.
3. ``GroupQueryAttention`` over a cache of 8 bits gets one of float32.
4. Where activations are float16 or bfloat16, every value and every ``Cast`` to these is float32.

Everything else that is known to be exact stays as it is. What is not known is an error, not something to
pass over. Weights are dequantised inside the graph, one matrix at a time, so that the twin of a large model
needs no more memory than the model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qconvert.errors import QconvertError
from qconvert.formats.graph_file import load_graph

_CONTRIB = "com.microsoft"
_FLOAT = ir.DataType.FLOAT
_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
# Operators that compute as exactly as float32 does, or move values, or count.
EXACT = frozenset(
    {
        *("Abs", "Add", "And", "Attention", "Clip", "Concat", "Constant", "DequantizeLinear", "Div", "Equal"),
        *("Expand", "FusedMatMul", "Gather", "GatherBlockQuantized", "GatherElements", "GatherND", "Greater"),
        *("GreaterOrEqual", "Identity", "If", "Less", "LessOrEqual", "Loop", "MatMul", "Max", "Min", "Mul"),
        *("Neg", "QuickGelu", "RMSNormalization", "Range", "ReduceMax", "ReduceSum", "Reshape", "Round"),
        *(
            "RotaryEmbedding",
            "ScatterElements",
            "ScatterND",
            "Shape",
            "Sigmoid",
            "SimplifiedLayerNormalization",
        ),
        *(
            "SkipSimplifiedLayerNormalization",
            "Slice",
            "Softmax",
            "Split",
            "Squeeze",
            "Sub",
            "TensorScatter",
            "TopK",
        ),
        *("Transpose", "Unsqueeze", "Where"),
    }
)
# Through these a quantised activation keeps its zero point.
_CARRY_CODES = frozenset({"Reshape", "Split", "Identity", "Transpose", "Slice", "Squeeze", "Unsqueeze"})
_OUTPUT_OF_CODES = "new."


def sharp_twin(path: Path, *, half: bool) -> ir.Model:
    """The twin of the graph in a file, whose weights stay in the data file beside it.

    Args:
        path: the stored graph.
        half: its activations are float16 or bfloat16.

    Raises:
        QconvertError: an operator, or a use of one, whose exact counterpart is not known.
    """
    model = load_graph(path)
    _Rewrite(path, model.graph, half).run()
    return model


class _Rewrite:
    """One graph on its way to its twin."""

    def __init__(self, path: Path, graph: ir.Graph, half: bool) -> None:
        self._path = path
        self._graph = graph
        self._half = half
        # Codes that are not rounded any more, and the zero point around which they were to lie.
        self._zeros: dict[ir.Value, ir.Value] = {}
        self._raised: dict[ir.Value, ir.Value] = {}
        self._looked_up: set[ir.Value] = set()
        self._rules: dict[tuple[str, str], Callable[[ir.Node], None]] = {
            (_CONTRIB, "MatMulNBits"): self._blocks,
            (_CONTRIB, "MatMulIntegerToFloat"): self._integers,
            (_CONTRIB, "GroupQueryAttention"): self._attention,
            ("", "QuantizeLinear"): self._quantise,
            ("", "Cast"): self._cast,
        }

    def run(self) -> None:
        # A cache of codes or of half types becomes one of float32.
        for value in (*self._graph.inputs, *self._graph.outputs):
            if value.dtype == ir.DataType.INT8 or (self._half and value.dtype in _HALF):
                value.type = ir.TensorType(_FLOAT)
        self._rewrite(self._graph)

    def _rewrite(self, graph: ir.Graph) -> None:
        for node in list(graph):
            if self._half:
                self._raise_inputs(node)
            rule = self._rules.get((node.domain, node.op_type))
            if rule is not None:
                rule(node)
            elif node.op_type in EXACT and node.domain in ("", _CONTRIB):
                self._exact(node)
            else:
                raise self._unknown(node, f"the operator {node.op_type} is not known to it")

    # The rules.

    def _exact(self, node: ir.Node) -> None:
        codes = [value for value in node.inputs if value in self._zeros]
        if codes and (node.op_type not in _CARRY_CODES or codes != [node.inputs[0]]):
            raise self._unknown(node, f"{node.op_type} of quantised activations is not known to it")
        for output in node.outputs:
            if self._half and output.dtype in _HALF and output not in self._looked_up:
                output.type = ir.TensorType(_FLOAT)
            elif codes:
                output.type = ir.TensorType(_FLOAT)
                self._zeros[output] = self._zeros[codes[0]]
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                self._rewrite(attribute.as_graph())

    def _blocks(self, node: ir.Node) -> None:
        node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 1)

    def _attention(self, node: ir.Node) -> None:
        for name in ("kv_cache_bit_width", "k_quant_type", "v_quant_type"):
            node.attributes.pop(name, None)
        for index in range(12, len(node.inputs)):
            node.replace_input_with(index, None)
        for output in node.outputs:
            if (
                output.dtype is not None
                and output.dtype != _FLOAT
                and (self._half or output.dtype not in _HALF)
            ):
                output.type = ir.TensorType(_FLOAT)

    def _cast(self, node: ir.Node) -> None:
        (output,) = node.outputs
        if self._half and ir.DataType(node.attributes["to"].as_int()) in _HALF:
            node.attributes["to"] = ir.AttrInt64("to", _FLOAT)
            output.type = ir.TensorType(_FLOAT)

    def _quantise(self, node: ir.Node) -> None:
        """round(x / step) + zero, cut off: the same about 0, without the rounding."""
        if len(node.inputs) != 3 or any(value is None for value in node.inputs) or node.attributes:
            raise self._unknown(node, "this use of QuantizeLinear is not known to it")
        value, step, zero = node.inputs
        assert zero is not None
        about = self._number(node, zero)
        if zero.dtype not in (ir.DataType.UINT8, ir.DataType.INT8) or about.size != 1:
            raise self._unknown(node, "a zero point of this kind is not known to it")
        ends = np.iinfo(zero.dtype.numpy())
        low, high = (
            self._constant(f"{node.name}.{name}", np.asarray(end - int(about.flat[0]), dtype=np.float32))
            for name, end in (("low", ends.min), ("high", ends.max))
        )
        scaled = self._before(node, "Div", [value, step])
        (codes,) = node.outputs
        of_cache = (codes.name or "").startswith(_OUTPUT_OF_CODES)
        # Keys and values beyond their scale are cut off by the 8 bits alone; a cache of float32 keeps them.
        exact = scaled if of_cache else self._before(node, "Clip", [scaled, low, high])
        if not of_cache:
            self._zeros[exact] = zero
        elif int(about.flat[0]):
            raise self._unknown(node, "keys or values about another zero than 0 are not known to it")
        self._replace(node, exact)

    def _integers(self, node: ir.Node) -> None:
        """(codes - zero) · step · matrix · scales."""
        if len(node.inputs) != 5 or any(value is None for value in node.inputs) or node.attributes:
            raise self._unknown(node, "this use of MatMulIntegerToFloat is not known to it")
        codes, matrix, step, scales, zero = node.inputs
        if codes not in self._zeros:
            raise self._unknown(node, "its activations come from no QuantizeLinear")
        assert zero is not None
        about, meant = self._number(node, zero), self._number(node, self._zeros[codes])
        if (moved := int(about.flat[0]) - int(meant.flat[0])) != 0:
            shift = self._constant(f"{node.name}.moved", np.asarray(moved, dtype=np.float32))
            codes = self._before(node, "Sub", [codes, shift])
        states = self._before(node, "Mul", [codes, step])
        weights = self._before(node, "DequantizeLinear", [matrix, scales], {"axis": 1})
        self._replace(node, self._before(node, "MatMul", [states, weights]))

    # Helpers of the rules.

    def _raise_inputs(self, node: ir.Node) -> None:
        """Half weights become float32: an embedding after its look-up, everything else where it is read."""
        if node.op_type == "Cast":
            return
        for index, value in enumerate(node.inputs):
            if value is None or value.const_value is None or value.dtype not in _HALF:
                continue
            if node.op_type == "Gather" and index == 0:
                (rows,) = node.outputs
                raised = ir.node("Cast", [rows], {"to": _FLOAT}, name=f"{node.name}.float32")
                raised.outputs[0].name = f"{rows.name}.float32"
                raised.outputs[0].type = ir.TensorType(_FLOAT)
                ir.convenience.replace_all_uses_with(rows, raised.outputs[0])
                raised.replace_input_with(0, rows)
                self._graph.insert_after(node, raised)
                self._looked_up.add(rows)
                continue
            if value not in self._raised:
                self._raised[value] = self._before(node, "Cast", [value], {"to": _FLOAT})
            node.replace_input_with(index, self._raised[value])

    def _before(
        self,
        node: ir.Node,
        op_type: str,
        inputs: list[ir.Value | None],
        attributes: dict[str, int] | None = None,
    ) -> ir.Value:
        made = ir.node(op_type, inputs, attributes or {})
        (output,) = made.outputs
        count = sum(1 for _ in self._graph)
        made.name, output.name = f"{node.name}.twin_{count}", f"{node.name}.twin_{count}.output"
        output.type = ir.TensorType(_FLOAT)
        assert node.graph is not None
        node.graph.insert_before(node, made)
        return output

    def _replace(self, node: ir.Node, value: ir.Value) -> None:
        (output,) = node.outputs
        name, producer = output.name, value.producer()
        assert producer is not None
        if output.is_graph_output():
            for index, found in enumerate(self._graph.outputs):
                if found is output:
                    value.shape = output.shape
                    self._graph.outputs[index] = value
            output.name, value.name = f"{name}.rounded", name
        ir.convenience.replace_all_uses_with(output, value)
        assert node.graph is not None
        node.graph.remove(node, safe=True)

    def _constant(self, name: str, value: np.ndarray) -> ir.Value:
        tensor = ir.tensor(value, name=name)
        made = ir.Value(
            name=name, shape=ir.Shape(value.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self._graph.register_initializer(made)
        return made

    def _number(self, node: ir.Node, value: ir.Value) -> np.ndarray:
        if value.const_value is None:
            raise self._unknown(node, "a zero point that is computed is not known to it")
        return np.asarray(value.const_value.numpy())

    def _unknown(self, node: ir.Node, what: str) -> QconvertError:
        return QconvertError(
            f"{node.name}: the proof cannot make the graph's sharp twin, {what}",
            where=self._path,
            hint="this is no file that this version of qconvert writes; if it is, please report it",
        )
