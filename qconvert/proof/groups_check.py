"""Attention by groups, operator by operator: each branch of a layer computes what the lowering writes there.

Such a branch runs where a cache is long, which texts of a proof hardly reach; and what computes the same but
for one place more or less would hide behind rounding. So its wiring is read: every value is written as the
expression that gives it, down to inputs and constants, and compared with the one that is due. Attributes and
constants are checked like those of every operator (``graph_check``, ``inventory``).
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from qconvert.formats.stored import BY_GROUPS
from qconvert.proof.weight_check import WeightFault

# Ends the names of what the branch with the whole attention returns.
WHOLE = ".whole"

# Operators that make lengths from the mask.
_OF_MASK = ("Sub", "ReduceSum")
# Characters shown on either side of where two expressions part.
_SHOWN = 40

_LAST = "Sub(ReduceSum(attention_mask,mask_axis),one)"
_POSITIONS = f"Unsqueeze({_LAST},by_groups_axes)"
_PLACES = f"Expand(Unsqueeze({_POSITIONS},by_groups_row),by_groups_shape)"
_LIMIT = f"Squeeze(Mul(Shape(past_key_values.0.key),Cast({BY_GROUPS})))"
_SEEN = f"LessOrEqual(Range(by_groups_first,{_LIMIT},by_groups_step),{_POSITIONS})"
_BIAS = f"Unsqueeze(Where({_SEEN},by_groups_shown,by_groups_hidden),by_groups_heads)"


def branch_faults(node: ir.Node, layer: int) -> Iterator[WeightFault]:
    """What is wrong with an ``If`` of a graph: it may only choose between two ways of attention."""
    where = str(node.name)
    if [value.name if value else None for value in node.inputs] != [BY_GROUPS]:
        yield WeightFault(where, f"the choice between two ways of attention does not depend on {BY_GROUPS}")
    names = [value.name for value in node.outputs]
    if names[1:] != [f"present.{layer}.key", f"present.{layer}.value"]:
        yield WeightFault(where, f"writes {', '.join(map(str, names[1:]))}, due are present.{layer}'s")
    branches = [node.attributes.get(f"{name}_branch") for name in ("then", "else")]
    if None in branches:
        return  # an attribute that is not there is a fault already
    by_groups, whole = (branch.as_graph() for branch in branches if branch is not None)
    kernels = [each for each in whole if each.op_type == "GroupQueryAttention"]
    if len(kernels) != 1 or len(list(whole)) != 1 or list(whole.outputs) != list(kernels[0].outputs):
        yield WeightFault(where, "one of its ways is not GroupQueryAttention alone")
        return
    packed = kernels[0].inputs[0]
    found = [_expression(value, packed, by_groups) for value in by_groups.outputs]
    due = _due(layer)
    if len(found) != len(due):
        yield WeightFault(where, f"{len(found)} outputs by groups, due are {len(due)}")
    for index, (one, other) in enumerate(zip(found, due)):
        if one != other:
            same = next((at for at, pair in enumerate(zip(one, other)) if len(set(pair)) > 1), 0)
            here, there = (text[max(0, same - _SHOWN) : same + _SHOWN] for text in (one, other))
            yield WeightFault(where, f"output {index} by groups is ..{here}.., due is ..{there}..")


def _due(layer: int) -> tuple[str, str, str]:
    """Context, keys and values, as ``lowering/ort/grouped.py`` computes them."""
    query, key, value = (f"Split.{index}(qkv,qkv_sizes)" for index in range(3))
    query, key = (f"RotaryEmbedding({states},{_POSITIONS},cos_cache,sin_cache)" for states in (query, key))
    keys, values = (
        f"ScatterElements(past_key_values.{layer}.{part},{_PLACES},Reshape({states},by_groups_token))"
        for part, states in (("key", key), ("value", value))
    )
    scores = f"Add(FusedMatMul(Reshape({query},by_groups_queries),{keys}),{_BIAS})"
    return f"Reshape(MatMul(Softmax({scores}),{values}),by_groups_context)", keys, values


def _expression(value: ir.Value | None, packed: ir.Value | None, branch: ir.Graph) -> str:
    if value is None:
        return "nothing"
    if value is packed:
        return "qkv"
    node = value.producer()
    # Beyond what belongs to this attention there is the whole decoder.
    if node is None or not (node.graph is branch or BY_GROUPS in str(node.name) or node.op_type in _OF_MASK):
        return str(value.name)
    output = f".{value.index()}" if len(node.outputs) > 1 else ""
    inputs = ",".join(_expression(each, packed, branch) for each in node.inputs)
    return f"{node.op_type}{output}({inputs})"
