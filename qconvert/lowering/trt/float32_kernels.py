"""Makes a graph of half types run on ONNX Runtime's CPU provider, rounding where a GPU rounds.

The provider moves bfloat16 but has no arithmetic in it, and computes float16 in float32 without always
rounding between two operators. Here every arithmetic operator computes in float32 from rounded operands,
and its result is rounded to the half type: what a GPU does that accumulates in float32.
"""

from __future__ import annotations

import onnx_ir as ir

_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
# Operators that copy bits and take every type; and Cast, which does the rounding.
_MOVES = frozenset({"Cast", "Gather", "Reshape", "Split", "TensorScatter", "Transpose"})


def compute_in_float32(model: ir.Model) -> None:
    """Put a ``Cast`` before and after every arithmetic operator on half types.

    Inputs, outputs and weights of the graph stay what they are: only Casts are added.
    """
    raised: dict[ir.Value, ir.Value] = {}
    for node in list(model.graph):
        if node.op_type in _MOVES:
            continue
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype in _HALF:
                if value not in raised:
                    raised[value] = _cast(value, f"{value.name}.float32", ir.DataType.FLOAT)
                    model.graph.insert_before(node, _producer(raised[value]))
                node.replace_input_with(index, raised[value])
        for output in node.outputs:
            if output.dtype in _HALF:
                model.graph.insert_after(node, _producer(_rounded(output)))


def _rounded(output: ir.Value) -> ir.Value:
    """Make ``output`` float32, and give its old name, type and readers to its rounded copy."""
    name, half = output.name, output.dtype
    assert half is not None
    output.name, output.type = f"{name}.exact", ir.TensorType(ir.DataType.FLOAT)
    readers = list(output.uses())
    rounded = _cast(output, str(name), half)
    for use in readers:
        use.node.replace_input_with(use.idx, rounded)
    return rounded


def _cast(value: ir.Value, name: str, dtype: ir.DataType) -> ir.Value:
    output = ir.Value(name=name, shape=value.shape, type=ir.TensorType(dtype))
    ir.node("Cast", [value], {"to": dtype}, outputs=[output], name=f"{name}/Cast")
    return output


def _producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None
    return node
