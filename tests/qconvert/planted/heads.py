"""Kinds in the norms of query's and key's heads, which Qwen3 has."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from tests.qconvert.planted.content import exchanged_with_next_layer, row_times
from tests.qconvert.planted.edits import (
    LAYER,
    DoesNotApplyError,
    Edit,
    Plant,
    behind,
    constant,
    in_bytes,
    in_graph,
    in_prompts,
    insert,
    node_of,
    use_instead,
)
from tests.qconvert.planted.operators import set_float

_NORM = "SimplifiedLayerNormalization"
_LAYER = f"model.layers.{LAYER}.self_attn"


def _place(part: str, layer: int = LAYER) -> str:
    return f"layers.{layer}/self_attn/{part}_norm/"


def left_out(part: str) -> Edit:
    def plant(graph: ir.Graph) -> None:
        node = node_of(graph, _NORM, _place(part))
        assert node.inputs[0] is not None
        use_instead(node.outputs[0], node.inputs[0])

    return plant


def weights_exchanged(first: tuple[str, int], second: tuple[str, int]) -> Edit:
    """Each of two norms reads the other's weight."""

    def plant(graph: ir.Graph) -> None:
        one, other = (node_of(graph, _NORM, _place(*each)) for each in (first, second))
        mine, others = one.inputs[1], other.inputs[1]
        one.replace_input_with(1, others)
        other.replace_input_with(1, mine)

    return plant


def over_all_heads(graph: ir.Graph) -> None:
    """The mean square is taken over all heads of the queries together."""
    node = node_of(graph, _NORM, _place("q"))
    reshape, weight = node.inputs[0], node.inputs[1]
    assert reshape is not None
    assert weight is not None
    assert weight.const_value is not None
    before = reshape.producer()
    (whole,) = (use.node for use in node.outputs[0].uses())
    assert before is not None
    sizes = whole.inputs[1]
    assert sizes is not None
    assert sizes.const_value is not None
    width, head = int(sizes.const_value.numpy()[-1]), weight.const_value.shape.numpy()[0]
    rows = np.tile(np.asarray(weight.const_value.numpy()), width // int(head))
    node.replace_input_with(0, before.inputs[0])
    node.replace_input_with(1, constant(graph, "planted_norm", rows, rows.dtype))


def values_normed_too(graph: ir.Graph) -> None:
    keys = node_of(graph, _NORM, _place("k"))
    (concat,) = (node for node in graph if node.op_type == "Concat" and _place("q_k") in str(node.name))
    before = keys.inputs[0].producer() if keys.inputs[0] is not None else None
    whole = next(iter(keys.outputs[0].uses())).node
    if before is None:
        raise DoesNotApplyError
    split = insert(graph, "Reshape", [concat.inputs[2], before.inputs[1]])
    normed = insert(
        graph, _NORM, [split, keys.inputs[1]], {"epsilon": keys.attributes["epsilon"].as_float(), "axis": -1}
    )
    concat.replace_input_with(2, insert(graph, "Reshape", [normed, whole.inputs[1]]))


_EDITS: dict[str, Edit] = {
    "norm of the queries' heads left out": left_out("q"),
    "norm of the keys' heads left out": left_out("k"),
    "norms of queries and keys exchanged": weights_exchanged(("q", LAYER), ("k", LAYER)),
    "head norm of another layer": weights_exchanged(("k", LAYER), ("k", LAYER + 1)),
    "queries normed over all heads at once": over_all_heads,
    "values normed as keys are": values_normed_too,
    "head norm with epsilon 1e-3": set_float(_NORM, "epsilon", 1e-3, _place("q")),
    "head norm 0.5% too strong, by a product": behind(_NORM, ("Mul", 1.005), place=_place("k")),
    "head norm through float16": behind(_NORM, ("half", None), ("float", None), place=_place("q")),
}
HEADS: dict[str, Plant] = {
    **{kind: in_graph(edit) for kind, edit in _EDITS.items()},
    **{f"prompts: {kind}": in_prompts(edit) for kind, edit in list(_EDITS.items())[:4]},
    "one weight of a head norm 5% off": in_bytes(f"{_LAYER}.q_norm.weight", row_times(1.05)),
    "head norms of two layers exchanged": exchanged_with_next_layer("self_attn.k_norm.weight"),
    "prompts: one weight of a head norm 5% off": in_bytes(
        f"{_LAYER}.k_norm.weight", row_times(1.05), "prefill.onnx"
    ),
}
