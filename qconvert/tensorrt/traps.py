"""Graphs that TensorRT accepts and builds wrongly, or refuses with a message that does not name the cause.

Each was seen with TensorRT-RTX 1.7.1. Our export avoids them all; a graph that somebody changed may not.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qconvert.errors import QconvertError

_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_BLOCK_SIZES = (16, 32, 64, 128)


def check_graph(path: Path) -> None:
    """Refuse a graph with a known trap, naming the node.

    Raises:
        QconvertError: the file is not an ONNX graph, or has one of the traps.
    """
    for node in _load(path).graph:
        for problem in _problems(node):
            raise QconvertError(
                f"{node.name}: {problem}",
                where=path,
                hint="export the model again with `qconvert export --target tensorrt`",
            )


def check_scales(path: Path) -> None:
    """Refuse a graph that TensorRT's parser refuses for its scales; TensorRT-RTX 1.7.1 takes them.

    Scales of zero and below come from checkpoints whose codes are kept: GGUF's Q4_0 has either sign.

    Raises:
        QconvertError: the file is not an ONNX graph, or a scale is not positive.
    """
    bad = [
        node
        for node in _load(path).graph
        if node.op_type == "DequantizeLinear" and not _positive(node.inputs[1])
    ]
    if bad:
        raise QconvertError(
            f"{'one matrix has' if len(bad) == 1 else f'{len(bad)} matrices have'} scales that are not "
            "positive, as codes of GGUF's Q4_0 have, and TensorRT's parser refuses these",
            where=path,
            hint="export again with --precision int4, which rounds the weights once more; or build with "
            "--backend rtx, which takes them",
        )


def _positive(scales: ir.Value | None) -> bool:
    """Whether all scales of an initializer are positive; True of what is computed in the graph."""
    if scales is None or scales.const_value is None:
        return True
    return bool((scales.const_value.numpy().astype(np.float32) > 0).all())


def _load(path: Path) -> ir.Model:
    try:
        return ir.load(path)
    except Exception as error:  # protobuf and onnx_ir have no common base class
        raise QconvertError(
            f"{path.name} is not an ONNX graph: {error}", where=path, hint="export the model again"
        ) from error


def _problems(node: ir.Node) -> Iterator[str]:
    if node.op_type in ("Attention", "TRT_Attention"):
        yield from _attention_problems(node)
    elif node.op_type == "TensorScatter":
        cache = node.inputs[0]
        if cache is None or not cache.is_graph_input() or not node.outputs[0].is_graph_output():
            yield "a KV cache must be an input of the graph, and what is written to it an output"
        elif cache.shape is None or not isinstance(cache.shape[2], int):
            yield "the KV cache has a dynamic length: TensorRT needs a static one"
    elif node.op_type == "DequantizeLinear":
        yield from _weight_problems(node)


def _attention_problems(node: ir.Node) -> Iterator[str]:
    def flag(name: str) -> object:
        return node.attributes[name].value if name in node.attributes else None

    if flag("is_causal") == 1 or flag("causal_kind") == "upper_left":
        yield "causal from the upper left: a decode step would see the first key alone"
    query = node.inputs[0]
    if query is not None and query.dtype not in _HALF and flag("TRT_decomposable") != 1:
        yield f"attention in {query.dtype}: TensorRT has kernels for float16 and bfloat16 only"
    if node.op_type == "Attention":
        if len(node.inputs) > 6 and node.inputs[6] is not None:
            yield "nonpad_kv_seqlen is ignored by TensorRT: keys beyond it would be seen"
    elif len(node.inputs) < 6 or node.inputs[5] is None:
        yield "the keys have no length: the whole static cache would be seen"


def _weight_problems(node: ir.Node) -> Iterator[str]:
    weight, block = node.inputs[0], node.attributes.get("block_size")
    if weight is not None and weight.dtype != ir.DataType.INT4:
        yield f"weights in {weight.dtype}: TensorRT takes signed 4-bit values"
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        yield "weights with zero points: TensorRT takes symmetric ones"
    axis = node.attributes["axis"].value if "axis" in node.attributes else 1
    if axis != 0 or block is None or block.value not in _BLOCK_SIZES:
        yield f"weights must be in blocks of {', '.join(map(str, _BLOCK_SIZES))} along the first axis"
