"""Kinds in the graph that decodes: attributes, and what is wired to what."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from tests.qconvert.mutants import outer
from tests.qconvert.planted.edits import (
    ATTENTION,
    LAYER,
    NORM,
    DoesNotApplyError,
    Edit,
    behind,
    constant,
    initializer,
    insert,
    node_of,
    nodes,
    norm,
    products,
    use_instead,
)


def times(op_type: str, name: str, factor: float) -> Edit:
    def plant(graph: ir.Graph) -> None:
        node = node_of(graph, op_type)
        node.attributes[name] = ir.AttrFloat32(name, node.attributes[name].as_float() * factor)

    return plant


def set_float(op_type: str, name: str, value: float, place: str = f"layers.{LAYER}/") -> Edit:
    def plant(graph: ir.Graph) -> None:
        node_of(graph, op_type, place).attributes[name] = ir.AttrFloat32(name, value)

    return plant


def set_int(op_type: str, name: str, value: int, place: str = f"layers.{LAYER}/") -> Edit:
    def plant(graph: ir.Graph) -> None:
        node_of(graph, op_type, place).attributes[name] = ir.AttrInt64(name, value)

    return plant


def window(longer: int) -> Edit:
    def plant(graph: ir.Graph) -> None:
        node = node_of(graph, ATTENTION)
        if "local_window_size" not in node.attributes:
            raise DoesNotApplyError
        found = node.attributes["local_window_size"].as_int()
        node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", found + longer)

    return plant


def window_where_there_is_none(graph: ir.Graph) -> None:
    node = node_of(graph, ATTENTION, "layers.0/")
    if "local_window_size" in node.attributes:
        raise DoesNotApplyError
    node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", 4000)


def cache_of_one_scale(graph: ir.Graph) -> None:
    node = node_of(graph, ATTENTION)
    if "k_quant_type" not in node.attributes:
        raise DoesNotApplyError
    node.attributes["k_quant_type"] = ir.AttrString("k_quant_type", "PER_TENSOR")


def exchange(op_type: str, first: int, second: int) -> Edit:
    """Two inputs of a node."""

    def plant(graph: ir.Graph) -> None:
        node = node_of(graph, op_type)
        if len(node.inputs) <= max(first, second):
            raise DoesNotApplyError
        one, other = node.inputs[first], node.inputs[second]
        node.replace_input_with(first, other)
        node.replace_input_with(second, one)

    return plant


def of_next_layer(op_type: str, index: int) -> Edit:
    """An input of a node is the next layer's."""

    def plant(graph: ir.Graph) -> None:
        node, other = (node_of(graph, op_type, f"layers.{layer}/") for layer in (LAYER, LAYER + 1))
        if len(node.inputs) <= index:
            raise DoesNotApplyError
        node.replace_input_with(index, other.inputs[index])

    return plant


def presents_exchanged(graph: ir.Graph) -> None:
    places = (f"layers.{layer}/" for layer in (LAYER, LAYER + 1))
    one, other = (outer(graph, node_of(graph, ATTENTION, place)).outputs[1] for place in places)
    one.name, other.name = f"{other.name}", f"{one.name}"
    order = [value.name for value in graph.outputs]
    mine, others = order.index(one.name), order.index(other.name)
    graph.outputs[mine], graph.outputs[others] = graph.outputs[others], graph.outputs[mine]


def residual_left_out(graph: ir.Graph) -> None:
    node = norm(graph, "post_attention")
    node.replace_input_with(1, node.inputs[0])


def mlp_left_out(graph: ir.Graph) -> None:
    node = norm(graph, "input", LAYER + 1)
    delta = node.inputs[0]
    node.replace_input_with(0, insert(graph, "Sub", [delta, delta]))


def output_projection_left_out(graph: ir.Graph) -> None:
    context = outer(graph, node_of(graph, ATTENTION)).outputs[0]
    norm(graph, "post_attention").replace_input_with(0, context)


def mlp_reads_the_other_norm(graph: ir.Graph) -> None:
    use_instead(norm(graph, "post_attention").outputs[0], norm(graph, "input").outputs[0])


def gate_and_up_exchanged(graph: ir.Graph) -> None:
    for gate, up in zip(products(graph, "gate_proj"), products(graph, "up_proj"), strict=True):
        for index in range(1, len(gate.inputs)):
            one, other = gate.inputs[index], up.inputs[index]
            gate.replace_input_with(index, other)
            up.replace_input_with(index, one)


def matrix_of_next_layer(graph: ir.Graph) -> None:
    for mine, next_ones in zip(products(graph, "o_proj"), products(graph, "o_proj", LAYER + 1), strict=True):
        for index in range(1, len(mine.inputs)):
            mine.replace_input_with(index, next_ones.inputs[index])


def _bias(graph: ir.Graph) -> tuple[ir.Node, int]:
    """Who reads the bias of q, k and v, and as which input."""
    value = initializer(graph, f"model.layers.{LAYER}.self_attn.q_k_v_proj.bias")
    if value.const_value is None or not value.const_value.numpy().any():
        raise DoesNotApplyError  # the sample was made of a model without biases
    (use,) = value.uses()
    return use.node, use.idx


def bias_left_out(graph: ir.Graph) -> None:
    node, index = _bias(graph)
    if node.op_type == "Add":
        other = node.inputs[1 - index]
        assert other is not None
        use_instead(node.outputs[0], other)
    else:
        node.replace_input_with(index, None)


def bias_of_next_layer(graph: ir.Graph) -> None:
    node, index = _bias(graph)
    node.replace_input_with(index, initializer(graph, f"model.layers.{LAYER + 1}.self_attn.q_k_v_proj.bias"))


def _reordered(graph: ir.Graph, what: str) -> None:
    """Heads of packed queries or keys in another order."""
    attention = node_of(graph, ATTENTION)
    packed = attention.inputs[0]
    heads, kv_heads = (attention.attributes[name].as_int() for name in ("num_heads", "kv_num_heads"))
    cos = initializer(graph, "cos_cache").const_value
    assert cos is not None
    size = 2 * int(cos.shape.numpy()[1])
    order = np.arange((heads + 2 * kv_heads) * size)
    part = slice(0, heads * size) if what == "queries" else slice(heads * size, (heads + kv_heads) * size)
    order[part] = np.roll(order[part], size)
    indices = constant(graph, "planted_order", order, np.int64)
    attention.replace_input_with(0, insert(graph, "Gather", [packed, indices], {"axis": 2}))


def lengths_of_the_longest_row(graph: ir.Graph) -> None:
    """Every row is as long as the longest one, as if the mask had no effect."""
    rows = node_of(graph, "ReduceSum", "").outputs[0]
    largest = insert(graph, "ReduceMax", [rows])
    zeros = insert(graph, "Sub", [rows, rows])
    same = insert(graph, "Add", [zeros, largest])
    for use in list(rows.uses()):
        if "planted" not in str(use.node.name):
            use.node.replace_input_with(use.idx, same)


def rows_one_short(graph: ir.Graph) -> None:
    """The newest token of every row is not looked at."""
    length = node_of(graph, "Sub", "").outputs[0]
    shorter = insert(graph, "Sub", [length, initializer(graph, "one")])
    use_instead(length, shorter, but=shorter)


def logits_one_position_late(graph: ir.Graph) -> None:
    start = next(value for value in graph.inputs if value.name == "logits_start")
    earlier = insert(graph, "Sub", [start, initializer(graph, "one")])
    use_instead(start, earlier, but=earlier)


def head_of_the_embedding(graph: ir.Graph) -> None:
    (product,) = products(graph, "lm_head")
    names = [None if value is None else str(value.name) for value in product.inputs]
    for index, name in enumerate(names[1:], 1):
        if name is not None:
            twin = name.replace("lm_head.weight", "model.embed_tokens.weight")
            if twin == name:
                raise DoesNotApplyError
            product.replace_input_with(index, initializer(graph, twin))


def second_step(op_type: str) -> Edit:
    """The lower halves of the head are counted twice (Add) or not at all (Sub)."""

    def plant(graph: ir.Graph) -> None:
        node = node_of(graph, "ScatterElements", "lm_head")
        node.replace_input_with(2, insert(graph, op_type, [node.inputs[2]] * 2))

    return plant


def second_step_of_the_first_position(graph: ir.Graph) -> None:
    """Every position's second step multiplies the states of the first one."""
    body = node_of(graph, "Loop", "lm_head").attributes["body"].as_graph()
    state = next(node for node in body if node.name.endswith("/state"))
    tokens = next(node for node in body if node.name.endswith("/tokens"))
    index = tokens.inputs[1]
    assert index is not None
    zero = ir.node("Sub", [index, index], name="/lm_head/planted")
    zero.outputs[0].name = "planted_index"
    body.insert_before(state, zero)
    state.replace_input_with(1, zero.outputs[0])


def the_unlikeliest(graph: ir.Graph) -> None:
    node_of(graph, "TopK", "lm_head").attributes["largest"] = ir.AttrInt64("largest", 0)


def no_sum(graph: ir.Graph) -> None:
    node_of(graph, "ScatterElements", "lm_head").attributes["reduction"] = ir.AttrString("reduction", "none")


def through_8_bits(graph: ir.Graph) -> None:
    """A norm rounded to 127ths of 4, and made float again."""
    value = node_of(graph, NORM).outputs[0]
    readers = list(value.uses())
    inputs = [constant(graph, "planted_step", 4 / 127), constant(graph, "planted_zero", 0, np.int8)]
    rounded = insert(graph, "QuantizeLinear", [value, *inputs])
    back = insert(graph, "DequantizeLinear", [rounded, *inputs])
    for use in readers:
        use.node.replace_input_with(use.idx, back)


def without_positions_of_keys(graph: ir.Graph) -> None:
    """Angles of all positions are those of the first."""
    for attention in nodes(graph, ATTENTION):
        if len(attention.inputs) < 9:
            raise DoesNotApplyError
        cos, sin = (initializer(graph, f"{name}_cache") for name in ("cos", "sin"))
        for index, table in ((7, cos), (8, sin)):
            assert table.const_value is not None
            rows = np.array(table.const_value.numpy())
            rows[:] = rows[:1]
            attention.replace_input_with(index, constant(graph, f"planted_{table.name}", rows, rows.dtype))


ATTRIBUTES: dict[str, Edit] = {
    "attention scale 5% off in one layer": times(ATTENTION, "scale", 1.05),
    "soft cap of 5 in one layer": set_float(ATTENTION, "softcap", 5.0),
    "one more in the softmax's sum": set_int(ATTENTION, "smooth_softmax", 1),
    "epsilon of 1e-3 in one norm": set_float(NORM, "epsilon", 1e-3),
    "epsilon of 1e-3 in the first norm": set_float(
        "SimplifiedLayerNormalization", "epsilon", 1e-3, "layers.0/"
    ),
    "SiLU 3% too steep in one layer": set_float("QuickGelu", "alpha", 1.03),
    "interleaved rotary positions": set_int(ATTENTION, "rotary_interleaved", 1),
    "no rotary positions": set_int(ATTENTION, "do_rotary", 0),
    "window one short": window(-1),
    "window one long": window(1),
    "a window of 4,000 where there is none": window_where_there_is_none,
    "another number of query heads": set_int(ATTENTION, "num_heads", 1),
    "a product 2% too strong by its alpha": set_float("FusedMatMul", "alpha", 1.02),
    "8-bit cache with one scale a layer": cache_of_one_scale,
    "second step for the unlikeliest tokens": the_unlikeliest,
    "second step in place of the first": no_sum,
}

WIRING: dict[str, Edit] = {
    "keys and values exchanged": exchange(ATTENTION, 3, 4),
    "cosines and sines exchanged": exchange(ATTENTION, 7, 8),
    "scales of keys and values exchanged": exchange(ATTENTION, 12, 13),
    "scales of another layer's keys": of_next_layer(ATTENTION, 12),
    "another layer's past keys": of_next_layer(ATTENTION, 3),
    "present keys of two layers exchanged": presents_exchanged,
    "the first position's angles for all": without_positions_of_keys,
    "norm of another layer": of_next_layer(NORM, 2),
    "output projection of another layer": matrix_of_next_layer,
    "bias of q, k and v left out": bias_left_out,
    "bias of another layer": bias_of_next_layer,
    "query heads in another order": lambda graph: _reordered(graph, "queries"),
    "key heads in another order": lambda graph: _reordered(graph, "keys"),
    "gate and up exchanged": gate_and_up_exchanged,
    "residual left out": residual_left_out,
    "residual 0.5% too weak": behind(NORM, ("Mul", 0.995), output=3),
    "an MLP left out": mlp_left_out,
    "an output projection left out": output_projection_left_out,
    "MLP reads the norm before attention": mlp_reads_the_other_norm,
    "attention 1% too strong, by a product": behind(ATTENTION, ("Mul", 1.01)),
    "norm 0.5% too strong, by a product": behind(NORM, ("Mul", 1.005)),
    "norm shifted by 0.01": behind(NORM, ("Add", 0.01)),
    "activation 1% too strong": behind("QuickGelu", ("Mul", 1.01)),
    "activation cut off at 1": behind("QuickGelu", ("Min", 1.0)),
    "through float16": behind(NORM, ("half", None), ("float", None)),
    "through bfloat16": behind(NORM, ("bfloat16", None), ("float", None)),
    "through int": behind(NORM, ("int", None), ("float", None)),
    "through 8 bits": through_8_bits,
    "another activation behind attention": behind(ATTENTION, ("Tanh", None)),
    "mask not looked at": lengths_of_the_longest_row,
    "rows one token short": rows_one_short,
    "logits one position late": logits_one_position_late,
    "the embedding as head": head_of_the_embedding,
    "second step twice": second_step("Add"),
    "second step left out": second_step("Sub"),
    "second step with the first position's states": second_step_of_the_first_position,
}
