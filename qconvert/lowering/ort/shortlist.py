"""The head in two steps, in ONNX Runtime's operators (see ``qconvert.formats.shortlist``).

    coarse = MatMulNBits(16 x, upper halves)                    every logit, 4 bits a weight
    tokens = TopK(coarse), range by range of the vocabulary
    logits = coarse + ScatterElements(tokens, x · lower halves of these rows)

The lower halves are looked up position by position, in a Loop (a Scan refuses to run for none): the rows
of all positions at once would take several times the memory of the logits.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qconvert.formats.recipe import BlockFormat
from qconvert.formats.shortlist import Shortlist
from qconvert.formats.stored import SHORTLIST_RANGES, SHORTLIST_SIZE
from qconvert.lowering.initializers import PackedValues
from qconvert.lowering.ort.graph import CONTRIB, OrtGraph

_HEAD = "lm_head.weight"


def look_up(
    graph: OrtGraph, packed: PackedValues, token_ids: ir.Value, block_size: int, name: str
) -> ir.Value:
    """Rows of an embedding in halves."""
    scales = graph.scales(packed, name)
    upper, lower = (
        graph.op(
            "GatherBlockQuantized", [half, token_ids, scales], _blocks(block_size), domain=CONTRIB, name=name
        )
        for half in (graph.initializers.flat_view(packed), packed["lower"])
    )
    return graph.op("Add", [graph.op("Mul", [upper, _sixteen(graph)], name=name), lower], name=name)


def multiply(
    graph: OrtGraph, hidden: ir.Value, packed: PackedValues, fmt: BlockFormat, size: int
) -> ir.Value:
    """Logits ``[batch, seq, vocab]`` of ``hidden`` ``[batch, seq, K]``."""
    vocab, shortlist = packed.rows, Shortlist.of(size, packed.rows)

    def shape(name: str, *sizes: int) -> ir.Value:
        return graph.initializers.constant(name, np.array(sizes, dtype=np.int64))

    half = BlockFormat(4, fmt.block_size, symmetric=True)
    scaled = graph.op("Mul", [hidden, _sixteen(graph)], name=_HEAD)
    coarse = graph.multiply_packed(scaled, packed, half, None, _HEAD)
    ranges = shape(SHORTLIST_RANGES, -1, shortlist.ranges, vocab // shortlist.ranges)
    per_range = shape(SHORTLIST_SIZE, shortlist.per_range)
    in_ranges = graph.op("Reshape", [coarse, ranges], name=_HEAD)
    _, found = graph.ops("TopK", [in_ranges, per_range], {"axis": -1, "sorted": 0}, 2, name=_HEAD)
    starts = np.arange(0, vocab, vocab // shortlist.ranges, dtype=np.int64)[:, None]
    moved = graph.op("Add", [found, graph.initializers.constant("shortlist_starts", starts)], name=_HEAD)
    chosen_shape = shape("shortlist_shape", -1, shortlist.ranges * shortlist.per_range)
    chosen = graph.op("Reshape", [moved, chosen_shape], name=_HEAD)
    states = graph.op("Reshape", [hidden, shape("hidden_rows_shape", -1, packed.columns)], name=_HEAD)
    positions = graph.op("Squeeze", [graph.op("Shape", [chosen], {"end": 1}, name=_HEAD)], name=_HEAD)
    corrections = graph.op(
        "Loop",
        [positions, None],
        {"body": _corrections(graph, packed, fmt, chosen, states)},
        name=_HEAD,
    )
    rows = graph.op("Reshape", [coarse, shape("logits_rows_shape", -1, vocab)], name=_HEAD)
    corrected = graph.op(
        "ScatterElements", [rows, chosen, corrections], {"axis": 1, "reduction": "add"}, name=_HEAD
    )
    whole = graph.op("Shape", [coarse], name=_HEAD)
    # allowzero: where no position is asked for, a 0 in the shape means no element, and not "as in the input".
    return graph.op("Reshape", [corrected, whole], {"allowzero": 1}, name=_HEAD)


def _corrections(
    graph: OrtGraph, packed: PackedValues, fmt: BlockFormat, chosen: ir.Value, states: ir.Value
) -> ir.Graph:
    """The body for one position: what the lower halves of the chosen rows add to their logits."""
    position, going_on = (
        ir.Value(name=name, shape=ir.Shape(()), type=ir.TensorType(dtype))
        for name, dtype in (("position", ir.DataType.INT64), ("going_on", ir.DataType.BOOL))
    )
    tokens, state, rows, product, more = nodes = [
        ir.node("Gather", [chosen, position]),
        ir.node("Gather", [states, position]),
        ir.node(
            "GatherBlockQuantized",
            [packed["lower"], None, graph.scales(packed, _HEAD)],
            _blocks(fmt.block_size),
            domain=CONTRIB,
        ),
        # A plain MatMul with a vector on its right takes nine times as long.
        ir.node("FusedMatMul", [None, None], {"transB": 1}, domain=CONTRIB),
        ir.node("Identity", [going_on]),
    ]
    rows.replace_input_with(1, tokens.outputs[0])
    product.replace_input_with(0, state.outputs[0])
    product.replace_input_with(1, rows.outputs[0])
    for name, node in zip(("tokens", "state", "rows", "corrections", "goes_on"), nodes):
        node.name, node.outputs[0].name = f"/lm_head/{name}", name
    more.outputs[0].type, more.outputs[0].shape = going_on.type, going_on.shape
    found = product.outputs[0]
    found.type, found.shape = ir.TensorType(graph.dtype), ir.Shape(("shortlist",))
    return ir.Graph([position, going_on], [more.outputs[0], found], nodes=nodes, name="corrections")


def _blocks(block_size: int) -> dict[str, int]:
    return {"bits": 4, "block_size": block_size, "gather_axis": 0, "quantize_axis": 1}


def _sixteen(graph: OrtGraph) -> ir.Value:
    return graph.initializers.constant("upper_half", np.asarray(16, dtype=graph.dtype.numpy()))
