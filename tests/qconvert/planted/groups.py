"""Kinds in attention by groups: in a branch of a layer, and in what all branches share."""

from __future__ import annotations

import onnx_ir as ir

from tests.qconvert.planted.edits import Edit, initializer, insert, node_of, use_instead


def branch(graph: ir.Graph) -> ir.Graph:
    """Attention by groups of the first layer that has it."""
    return node_of(graph, "If", "").attributes["then_branch"].as_graph()


def scale_by_groups(graph: ir.Graph) -> None:
    node = node_of(branch(graph), "FusedMatMul", "")
    node.attributes["alpha"] = ir.AttrFloat32("alpha", node.attributes["alpha"].as_float() * 1.05)


def exchanged_by_groups(op_type: str, index: int, other: str, other_index: int) -> Edit:
    """An input of a node of the branch reads what another one's reads."""

    def plant(graph: ir.Graph) -> None:
        node, source = node_of(branch(graph), op_type, ""), node_of(branch(graph), other, "")
        node.replace_input_with(index, source.inputs[other_index])

    return plant


def bias_left_out_by_groups(graph: ir.Graph) -> None:
    """Places of the cache that no token has filled are attended to."""
    node = node_of(branch(graph), "Add", "")
    scores = node.inputs[0]
    assert scores is not None
    use_instead(node.outputs[0], scores)


def written_elsewhere_by_groups(graph: ir.Graph) -> None:
    """The new token's keys and values go one place too far back."""
    places = node_of(graph, "Expand", "attend_by_groups").outputs[0]
    earlier = insert(graph, "Sub", [places, initializer(graph, "one")])
    use_instead(places, earlier, but=earlier)


def one_place_less_by_groups(graph: ir.Graph) -> None:
    """The newest token does not see itself."""
    node = node_of(graph, "LessOrEqual", "attend_by_groups")
    node.op_type = "Less"


def keys_of_another_layer_by_groups(graph: ir.Graph) -> None:
    mine = node_of(branch(graph), "ScatterElements", "")
    before = mine.inputs[0]
    others = [value for value in graph.inputs if str(value.name).endswith(".key") and value is not before]
    mine.replace_input_with(0, others[0])


def branches_exchanged(graph: ir.Graph) -> None:
    node = node_of(graph, "If", "")
    one, other = (node.attributes[f"{name}_branch"].as_graph() for name in ("then", "else"))
    node.attributes["then_branch"] = ir.AttrGraph("then_branch", other)
    node.attributes["else_branch"] = ir.AttrGraph("else_branch", one)


GROUPS: dict[str, Edit] = {
    "scale of attention by groups 5% off": scale_by_groups,
    "by groups: keys in place of values": exchanged_by_groups("MatMul", 1, "FusedMatMul", 1),
    "by groups: scores not cut off": bias_left_out_by_groups,
    "by groups: another layer's past keys": keys_of_another_layer_by_groups,
    "by groups: written one place too early": written_elsewhere_by_groups,
    "by groups: the newest token is not seen": one_place_less_by_groups,
    "by groups: the two ways exchanged": branches_exchanged,
}
