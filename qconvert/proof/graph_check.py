"""Every operator and attribute of a stored graph, held against the checkpoint's configuration.

An attribute that is a little wrong (an epsilon, a scale, a window) may hide behind the rounding of
activations, but it can be read. ``_ATTRIBUTES`` has every operator that an export is written in and what its
attributes may be; an operator or an attribute that does not stand there is a failure as well.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qconvert.formats.graph_file import load_graph
from qconvert.formats.stored import ORDER_PREFIX, kv_scale_name
from qconvert.models.spec import DecoderSpec
from qconvert.proof.groups_check import WHOLE, branch_faults
from qconvert.proof.weight_check import WeightFault
from qrun.folder.manifest import Manifest

_CONTRIB = "com.microsoft"
_TRT = "trt"
# Stands for an attribute that is not there.
ABSENT = None
_Values = tuple[Any, ...]
_Allowed = Mapping[str, _Values]
_LAYER = re.compile(r"layers\.(\d+)")
_CODES = re.compile(r"\.q[48]\b")


@dataclass(frozen=True)
class _Due:
    """What the attributes of one export's graphs follow from."""

    spec: DecoderSpec
    half: bool
    int8_cache: bool
    accuracy_level: int
    static: bool


def check_graphs(manifest: Manifest, spec: DecoderSpec) -> list[WeightFault]:
    """All graphs of a folder; faults have the names of nodes, and of files beside the first."""
    due = _Due(
        spec,
        half=manifest.precision in ("fp16", "bf16") or manifest.target == "tensorrt",
        int8_cache=manifest.kv.dtype == "int8",
        accuracy_level=manifest.recipe.accuracy_level,
        static=manifest.target == "tensorrt",
    )
    return faults_of_graphs(manifest, lambda path: _check(path, due))


def faults_of_graphs(manifest: Manifest, check: Callable[[Path], Iterable[WeightFault]]) -> list[WeightFault]:
    """What ``check`` finds in each graph of a folder; beside the first graph, names begin with the file's."""
    faults = []
    for entry in manifest.files:
        if entry.path.endswith(".onnx"):
            path = manifest.folder / entry.path
            prefix = "" if path == manifest.graph_path else f"{path.name}: "
            faults += [WeightFault(prefix + fault.tensor, fault.what) for fault in check(path)]
    return faults


def _check(path: Path, due: _Due) -> Iterator[WeightFault]:
    for node in ir.traversal.RecursiveGraphIterator(load_graph(path).graph):
        where = node.name or node.op_type
        rule = _ATTRIBUTES.get((node.domain, node.op_type))
        if rule is None:
            yield WeightFault(where, f"the operator {node.op_type} has no place in an export")
            continue
        allowed = rule(node, due) if callable(rule) else rule
        for name in dict.fromkeys((*allowed, *node.attributes)):
            found = _value(node, name)
            if name not in allowed:
                yield WeightFault(where, f"the attribute {name} ({found}) is not expected")
            elif not any(_same(found, value) for value in allowed[name]):
                values = " or ".join("none" if value is ABSENT else f"{value}" for value in allowed[name])
                yield WeightFault(
                    where, f"{name} is {'not there' if found is ABSENT else found}, due is {values}"
                )
        if node.op_type == "GroupQueryAttention":
            yield from _cache_faults(node, where, due)
        if node.op_type == "MatMulNBits":
            yield from _residual_faults(node, where)
        if node.op_type == "If":
            yield from branch_faults(node, _layer(node))


def _value(node: ir.Node, name: str) -> Any:
    attribute = node.attributes.get(name)
    if attribute is None:
        return ABSENT
    return "a graph" if attribute.type == ir.AttributeType.GRAPH else attribute.value


def _same(found: Any, due: Any) -> bool:
    if isinstance(found, float) and isinstance(due, float):
        return math.isclose(found, due, rel_tol=1e-6)
    if isinstance(found, (list, tuple)):
        return isinstance(due, tuple) and tuple(found) == due
    return bool(found == due)


def _cache_faults(node: ir.Node, where: str, due: _Due) -> Iterator[WeightFault]:
    """Attention has to read and write its own layer's keys and values, with their own scales."""
    layer = _layer(node)
    wanted = {3: f"past_key_values.{layer}.key", 4: f"past_key_values.{layer}.value"}
    if "kv_cache_bit_width" in node.attributes:
        wanted |= {12: kv_scale_name(layer, "key"), 13: kv_scale_name(layer, "value")}
    elif due.int8_cache:  # a graph for prompts: it attends to what the cache will hold, codes made float
        wanted |= {1: f"new.{layer}.key", 2: f"new.{layer}.value"}
    for index, name in wanted.items():
        found = _source(node.inputs[index]) if index < len(node.inputs) else None
        if found != name:
            yield WeightFault(where, f"reads {found}, due is {name}")
    for index, part in ((1, "key"), (2, "value")):
        output = node.outputs[index] if index < len(node.outputs) else None
        if output is not None and output.is_graph_output():
            name = str(output.name).removesuffix(WHOLE)  # of a branch
            if name != f"present.{layer}.{part}":
                yield WeightFault(where, f"writes {name}, due is present.{layer}.{part}")


def _residual_faults(node: ir.Node, where: str) -> Iterator[WeightFault]:
    """Residuals of a matrix have to be multiplied with sums of its own features, and added to its product."""
    codes = str(node.inputs[1].name) if node.inputs[1] is not None else ""
    residuals = _CODES.sub(".residuals", codes)
    # Halves of a head have names without a number of bits, and no residuals.
    if residuals == codes or node.graph is None or residuals not in node.graph.initializers:
        return
    users = [use.node for use in node.outputs[0].uses()]
    if len(users) != 1 or users[0].op_type != "Add":
        yield WeightFault(where, f"{residuals} is not added to the product")
        return
    (other,) = (value for value in users[0].inputs if value is not node.outputs[0])
    product = _made_by(other, "FusedMatMul")
    sums = _made_by(None if product is None else product.inputs[0], "ReduceSum")
    blocks = _made_by(None if sums is None else sums.inputs[0], "Reshape")
    if product is None or product.inputs[1] is None or product.inputs[1].name != residuals:
        yield WeightFault(where, f"what is added to the product is not {residuals}")
    elif blocks is None or blocks.inputs[0] is not node.inputs[0]:
        yield WeightFault(where, f"{residuals} is not multiplied with sums of the product's own features")


def _made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that gives a value, if it is of this type."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type else None


def _source(value: ir.Value | None) -> str | None:
    """The name of what is read, also where codes are cut to their length and made float on the way."""
    while value is not None and (producer := value.producer()) is not None:
        if producer.op_type not in ("Cast", "Mul", "Slice") or value.is_graph_output():
            break
        value = producer.inputs[0]
    return None if value is None else value.name


def _layer(node: ir.Node) -> int:
    found = _LAYER.search(node.name or "")
    return int(found[1]) if found else -1


def _group_query_attention(node: ir.Node, due: _Due) -> _Allowed:
    spec, layer = due.spec, _layer(node)
    known = 0 <= layer < spec.num_hidden_layers
    # The graph for prompts over a cache of 8 bits rotates beforehand, and attends in float32.
    rotated = due.int8_cache and len(node.inputs) <= 7
    quantised = due.int8_cache and not rotated
    return {
        "num_heads": (spec.num_attention_heads,),
        "kv_num_heads": (spec.num_key_value_heads,),
        "scale": (float(spec.head_size**-0.5),),
        "do_rotary": (0,) if rotated else (1,),
        "rotary_interleaved": (ABSENT, 0),
        "local_window_size": (spec.sliding_windows[layer] if known else ABSENT,),
        **({"kv_cache_bit_width": (8,)} if quantised else {}),
        **({f"{part}_quant_type": ("PER_CHANNEL",) for part in "kv"} if quantised else {}),
    }


def _norm(node: ir.Node, due: _Due) -> _Allowed:
    return {"epsilon": (float(due.spec.rms_norm_eps),), "axis": (-1,)}


def _skip_norm(node: ir.Node, due: _Due) -> _Allowed:
    return {"epsilon": (float(due.spec.rms_norm_eps),)}


def _blocks(node: ir.Node, due: _Due) -> _Allowed:
    """Sizes follow from the checkpoint's and from the stored matrix."""
    matrix = node.inputs[1]
    rows, _, width = _shape(matrix) if matrix is not None and len(_shape(matrix)) == 3 else (-1, -1, -1)
    bits = 8 if matrix is not None and ".q8" in str(matrix.name) else 4
    return {
        "K": (_inputs_of(str(node.name), due.spec),),
        "N": (rows,),
        "bits": (bits,),
        "block_size": (width * 8 // bits,),
        "accuracy_level": (due.accuracy_level,),
        "weight_prepacked": (ABSENT, 0),
    }


def _inputs_of(place: str, spec: DecoderSpec) -> int:
    if "down_proj" in place:
        return spec.intermediate_size
    return spec.query_size if "o_proj" in place else spec.hidden_size


def _of_attention(name: str) -> bool:
    return "/self_attn/attention/" in name


def _dense(node: ir.Node, due: _Due) -> _Allowed:
    scale = (float(due.spec.head_size**-0.5),) if _of_attention(str(node.name)) else (ABSENT,)
    return {"transB": (1,), "alpha": scale}


def _scatter(node: ir.Node, due: _Due) -> _Allowed:
    """A cache is written into, logits of a second step are added."""
    if _of_attention(str(node.name)):
        return {"axis": (2,), "reduction": (ABSENT,)}
    return {"axis": (1, -1), "reduction": ("add",)}


def _look_up(node: ir.Node, due: _Due) -> _Allowed:
    width, blocks = _shape(node.inputs[0])[-1], _shape(node.inputs[2])[-1]
    hidden = due.spec.hidden_size
    return {
        "bits": (8 * width // hidden,),
        "block_size": (hidden // max(1, blocks),),
        "gather_axis": (0,),
        "quantize_axis": (1,),
    }


def _gather(node: ir.Node, due: _Due) -> _Allowed:
    """Rows and positions are picked; features only to stand in a matrix's own order, each of them once."""
    order = node.inputs[1]
    if order is None or not str(order.name).startswith(ORDER_PREFIX) or order.const_value is None:
        return {"axis": (ABSENT, 0, 1)}
    picked = sorted(order.const_value.numpy().tolist())
    return {"axis": (-1,) if picked == list(range(len(picked))) else ("of an order of all features",)}


def _columns(node: ir.Node, due: _Due) -> _Allowed:
    rows, scales = _shape(node.inputs[0])[0], _shape(node.inputs[1])[0]
    return {"axis": (0,), "block_size": (rows // max(1, scales),)}


def _cast(node: ir.Node, due: _Due) -> _Allowed:
    """Codes, scales and logits become float32, lengths int32; 16 bits are for exports of 16 bits."""
    types = [ir.DataType.FLOAT, ir.DataType.INT32]
    if due.half:
        types += [ir.DataType.FLOAT16, ir.DataType.BFLOAT16]
    value = node.inputs[0]
    if value is not None and value.dtype == ir.DataType.FLOAT:
        types = types[2:]  # features are not counted
    if value is not None and value.dtype == ir.DataType.BOOL:
        types = [ir.DataType.INT64]  # a choice is counted
    return {"to": tuple(int(dtype) for dtype in types)}


def _shape(value: ir.Value | None) -> tuple[int, ...]:
    """The shape of a stored tensor, also after a ``Cast``; (-1,) for a scalar and for what is not stored."""
    while value is not None and value.const_value is None and (producer := value.producer()) is not None:
        value = producer.inputs[0]
    tensor = None if value is None else value.const_value
    return (-1,) if tensor is None or not tensor.shape.numpy() else tuple(tensor.shape.numpy())


_NONE: _Allowed = {}
_ATTRIBUTES: dict[tuple[str, str], _Allowed | Callable[[ir.Node, _Due], _Allowed]] = {
    **{
        ("", name): _NONE
        for name in (
            *("Abs", "Add", "And", "Div", "Equal", "Expand", "Greater", "GreaterOrEqual", "Identity", "Less"),
            *("LessOrEqual", "MatMul", "Max", "Min", "Mul", "QuantizeLinear", "Range", "ReduceMax"),
            *("RotaryEmbedding", "Round", "Sigmoid", "Slice", "Squeeze", "Sub", "Unsqueeze", "Where"),
        )
    },
    ("", "Attention"): {"scale": (1.0,)},
    ("", "Cast"): _cast,
    ("", "Concat"): {"axis": (-1, 0, 1)},
    ("", "DequantizeLinear"): _columns,
    ("", "Gather"): _gather,
    ("", "Loop"): {"body": ("a graph",)},
    ("", "RMSNormalization"): _norm,
    ("", "ReduceSum"): {"keepdims": (0,)},
    ("", "Reshape"): {"allowzero": (ABSENT, 0, 1)},
    ("", "If"): {f"{name}_branch": ("a graph",) for name in ("then", "else")},
    ("", "ScatterElements"): _scatter,
    ("", "Shape"): {"start": (ABSENT, 0, 1, 2), "end": (ABSENT, 1, 2, 3)},
    ("", "SimplifiedLayerNormalization"): _norm,
    ("", "Softmax"): {"axis": (-1,)},
    ("", "Split"): {"axis": (-1, 0, 2), "num_outputs": (ABSENT, 2, 4, 8)},
    ("", "TensorScatter"): {"axis": (2,)},
    ("", "TopK"): {"axis": (-1,), "sorted": (0,)},
    ("", "Transpose"): {"perm": ((1, 0), (0, 2, 1, 3))},
    (_CONTRIB, "FusedMatMul"): _dense,
    (_CONTRIB, "GatherBlockQuantized"): _look_up,
    (_CONTRIB, "GroupQueryAttention"): _group_query_attention,
    (_CONTRIB, "MatMulIntegerToFloat"): _NONE,
    (_CONTRIB, "MatMulNBits"): _blocks,
    (_CONTRIB, "QuickGelu"): {"alpha": (1.0,)},
    (_CONTRIB, "RotaryEmbedding"): lambda _, due: {
        "num_heads": (due.spec.num_attention_heads, due.spec.num_key_value_heads)
    },
    (_CONTRIB, "SkipSimplifiedLayerNormalization"): _skip_norm,
    (_TRT, "TRT_Attention"): {"causal_kind": ("lower_right",)},
}
