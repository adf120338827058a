"""Kinds in the graph for prompts (``prefill.onnx``), beside a graph that decodes and is right."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from qconvert.formats.stored import kv_scale_name
from tests.qconvert.planted import operators as first
from tests.qconvert.planted.content import one_kv_scale, row_times, to
from tests.qconvert.planted.edits import (
    ATTENTION,
    LAYER,
    NORM,
    DoesNotApplyError,
    Edit,
    Plant,
    behind,
    in_bytes,
    in_prompts,
    initializer,
    insert,
    nodes,
    use_instead,
)

_FILE = "prefill.onnx"


def codes_exchanged(one: tuple[int, str], other: tuple[int, str]) -> Edit:
    """Two outputs of new codes have each other's names."""

    def plant(graph: ir.Graph) -> None:
        names = [f"new.{layer}.{part}" for layer, part in (one, other)]
        values = {value.name: value for value in graph.outputs}
        if not set(names) <= set(values):
            raise DoesNotApplyError
        first_value, second_value = (values[name] for name in names)
        places = [
            next(i for i, value in enumerate(graph.outputs) if value is each)
            for each in (first_value, second_value)
        ]
        first_value.name, second_value.name = names[1], names[0]
        graph.outputs[places[0]], graph.outputs[places[1]] = second_value, first_value

    return plant


def positions_one_late(graph: ir.Graph) -> None:
    """All of a prompt is rotated one position further."""
    filled = nodes(graph, "RotaryEmbedding", "")[0].inputs[1]
    assert filled is not None
    later = insert(graph, "Add", [filled, initializer(graph, "one")])
    for node in nodes(graph, "RotaryEmbedding", ""):
        node.replace_input_with(1, later)


def positions_begin_again(graph: ir.Graph) -> None:
    """Every piece of a prompt is rotated from position 0 on."""
    filled = nodes(graph, "RotaryEmbedding", "")[0].inputs[1]
    assert filled is not None
    nothing = insert(graph, "Sub", [filled, filled])
    for node in nodes(graph, "RotaryEmbedding", ""):
        node.replace_input_with(1, nothing)


def keys_not_rotated(graph: ir.Graph) -> None:
    key = nodes(graph, "RotaryEmbedding")[1]
    assert key.inputs[0] is not None
    use_instead(key.outputs[0], key.inputs[0])


def earlier_pieces_not_seen(graph: ir.Graph) -> None:
    for node in nodes(graph, "Slice"):
        node.replace_input_with(1, node.inputs[2])


def exact_keys(graph: ir.Graph) -> None:
    """The prompt attends to keys that are not rounded, unlike all that follows."""
    attention = nodes(graph, ATTENTION)[0]
    attention.replace_input_with(1, nodes(graph, "RotaryEmbedding")[1].outputs[0])


def only_in_prompts(folder: Path) -> None:
    in_bytes(kv_scale_name(LAYER, "key"), one_kv_scale, _FILE)(folder)


_EDITS: dict[str, Edit] = {
    "attention scale 5% off": first.times(ATTENTION, "scale", 1.05),
    "window one short": first.window(-1),
    "epsilon of 1e-3": first.set_float(NORM, "epsilon", 1e-3),
    "SiLU 3% too steep": first.set_float("QuickGelu", "alpha", 1.03),
    "interleaved rotary positions": first.set_int("RotaryEmbedding", "interleaved", 1),
    "positions one late": positions_one_late,
    "positions begin again with every piece": positions_begin_again,
    "keys not rotated": keys_not_rotated,
    "earlier pieces not seen": earlier_pieces_not_seen,
    "keys read before they are rounded": exact_keys,
    "codes of two layers exchanged": codes_exchanged((LAYER, "key"), (LAYER + 1, "key")),
    "codes of keys and values exchanged": codes_exchanged((LAYER, "key"), (LAYER, "value")),
    "norm 0.5% too strong": behind(NORM, ("Mul", 1.005)),
    "activation 1% too strong": behind("QuickGelu", ("Mul", 1.01)),
    "through float16": behind(NORM, ("half", None), ("float", None)),
    "gate and up exchanged": first.gate_and_up_exchanged,
    "residual left out": first.residual_left_out,
    "embedding 1% too strong": behind("GatherBlockQuantized", ("Mul", 1.01), place="embed_tokens"),
}

PROMPTS: dict[str, Plant] = {
    **{f"prompts: {kind}": in_prompts(edit) for kind, edit in _EDITS.items()},
    "prompts: activations in 130ths": in_bytes("one_127th", to(1 / 130), _FILE),
    "prompts: keys in steps of 2": in_bytes("kv_step", to(2), _FILE),
    "prompts: codes about 1": in_bytes("kv_zero_point", to(1), _FILE),
    "prompts: a scale of the cache 10% off": only_in_prompts,
    "prompts: a channel's scale 10% off": in_bytes(
        f"model.layers.{LAYER}.self_attn.o_proj.weight.int8_scales", row_times(1.1), _FILE
    ),
    "prompts: a norm 5% too strong": in_bytes(
        f"model.layers.{LAYER}.input_layernorm.weight", lambda norm: norm * 1.05, _FILE
    ),
}
