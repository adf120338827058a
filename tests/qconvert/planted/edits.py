"""What planting needs: a graph, stored bytes or a small file of a folder changed and sealed again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from tests.qconvert.mutants import outer, reseal

# Errors are planted in this layer, unless a kind says otherwise.
LAYER = 1
ATTENTION, NORM = "GroupQueryAttention", "SkipSimplifiedLayerNormalization"
_PRODUCTS = ("MatMulNBits", "FusedMatMul", "MatMulIntegerToFloat")
_TABLES = ("cos_cache", "sin_cache")
Edit = Callable[[ir.Graph], None]
Plant = Callable[[Path], None]


class DoesNotApplyError(Exception):
    """The folder has no place for an error of this kind."""


def in_graph(edit: Edit, file: str = "model.onnx") -> Plant:
    """A kind that changes a graph."""

    def plant(folder: Path) -> None:
        path = folder / file
        if not path.is_file():
            raise DoesNotApplyError
        model = ir.load(path)
        edit(model.graph)
        model.graph.sort()
        _replace(path, lambda new: ir.save(model, new))
        reseal(folder)

    return plant


def in_prompts(edit: Edit) -> Plant:
    """A kind that changes the graph for prompts."""
    return in_graph(edit, "prefill.onnx")


def in_json(file: str, change: Callable[[dict[str, Any]], None]) -> Plant:
    """A kind that changes one of the small files."""

    def plant(folder: Path) -> None:
        path = folder / file
        if not path.is_file():
            raise DoesNotApplyError
        value = json.loads(path.read_text(encoding="utf-8"))
        before = json.dumps(value)
        change(value)
        if json.dumps(value) == before:
            raise DoesNotApplyError
        _replace(path, lambda new: new.write_text(json.dumps(value), encoding="utf-8"))
        reseal(folder)

    return plant


def in_text(file: str, change: Callable[[str], str]) -> Plant:
    """A kind that changes a text."""

    def plant(folder: Path) -> None:
        path = folder / file
        if not path.is_file():
            raise DoesNotApplyError
        text = path.read_text(encoding="utf-8")
        if (changed := change(text)) == text:
            raise DoesNotApplyError
        _replace(path, lambda new: new.write_text(changed, encoding="utf-8"))
        reseal(folder)

    return plant


def in_bytes(name: str, change: Callable[[NDArray[Any]], NDArray[Any]], graph: str = "model.onnx") -> Plant:
    """A kind that changes the stored content of initializers, by the end of their names."""

    def plant(folder: Path) -> None:
        found = list(stored(folder, name, graph))
        if not found:
            raise DoesNotApplyError
        for initializer in found[:1]:
            rewrite(folder, initializer, change, graph)

    return plant


def stored(folder: Path, ending: str, graph: str = "model.onnx") -> Iterator[str]:
    """Names of initializers that end so."""
    if (folder / graph).is_file():
        for name in ir.load(folder / graph).graph.initializers:
            if name.endswith(ending):
                yield name


def rewrite(
    folder: Path, name: str, change: Callable[[NDArray[Any]], NDArray[Any]], graph: str = "model.onnx"
) -> None:
    """Change one initializer, in the graph or in the data file beside it."""
    model = ir.load(folder / graph)
    if name not in model.graph.initializers:
        raise DoesNotApplyError
    value = model.graph.initializers[name]
    tensor = value.const_value
    assert tensor is not None
    before = np.array(tensor.numpy())
    after = np.array(change(before.copy()), dtype=before.dtype, order="C")
    assert after.shape == before.shape
    if after.tobytes() == before.tobytes():
        raise DoesNotApplyError
    if not isinstance(tensor, ir.ExternalTensor):
        value.const_value = ir.tensor(after, name=name)
        _replace(folder / graph, lambda new: ir.save(model, new))
    else:
        assert tensor.offset is not None
        content = bytearray((folder / tensor.location).read_bytes())
        content[tensor.offset : tensor.offset + after.nbytes] = after.tobytes()
        _replace(folder / tensor.location, lambda new: new.write_bytes(content))
    reseal(folder)


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    new = path.with_name(f"new-{path.name}")
    write(new)
    new.replace(path)


# Places of a graph.


def nodes(graph: ir.Graph, op_type: str, place: str = f"layers.{LAYER}/") -> list[ir.Node]:
    """All nodes of one kind in one place, at least one."""
    everywhere = ir.traversal.RecursiveGraphIterator(graph)
    found = [node for node in everywhere if node.op_type == op_type and place in str(node.name)]
    if not found:
        raise DoesNotApplyError
    return found


def node_of(graph: ir.Graph, op_type: str, place: str = f"layers.{LAYER}/") -> ir.Node:
    return nodes(graph, op_type, place)[0]


def products(graph: ir.Graph, matrix: str, layer: int = LAYER) -> list[ir.Node]:
    """The products with one matrix of a layer: several where it is cut."""
    place = f"layers.{layer}/" if matrix.endswith("_proj") else ""
    found = [
        node
        for node in graph
        if node.op_type in _PRODUCTS and place in node.name and f"/{matrix}/" in node.name
    ]
    if not found:
        raise DoesNotApplyError
    return found


def norm(graph: ir.Graph, name: str, layer: int = LAYER) -> ir.Node:
    """ "input" or "post_attention"."""
    return node_of(graph, NORM, f"layers.{layer}/{name}_layernorm/")


def initializer(graph: ir.Graph, name: str) -> ir.Value:
    if name not in graph.initializers:
        raise DoesNotApplyError
    return graph.initializers[name]


# Pieces of planted errors.


def constant(graph: ir.Graph, name: str, value: Any, dtype: Any = np.float32) -> ir.Value:
    """A new tensor. Its name hides it among the weights, so that it has to be found by what it does."""
    name = name if name in _TABLES else f"model.norm.weight.{name}"
    tensor = ir.tensor(np.asarray(value, dtype=dtype), name=name)
    made = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(made)
    return made


def insert(
    graph: ir.Graph,
    op_type: str,
    inputs: list[ir.Value | None],
    attributes: dict[str, Any] | None = None,
    domain: str = "",
) -> ir.Value:
    """A new node; graphs are sorted before they are saved."""
    number = sum(1 for node in graph if "/planted" in str(node.name))
    made = ir.node(op_type, inputs, attributes or {}, domain=domain, name=f"/planted_{number}/{op_type}")
    made.outputs[0].name = f"{made.name}.output"
    graph.append(made)
    return made.outputs[0]


def use_instead(old: ir.Value, new: ir.Value, but: ir.Value | None = None) -> None:
    """Let all readers of a value read another one instead, except for the node that makes ``but``."""
    spared = None if but is None else but.producer()
    for use in list(old.uses()):
        if use.node is not spared:
            use.node.replace_input_with(use.idx, new)


def behind(
    op_type: str, *made: tuple[str, float | None], place: str = f"layers.{LAYER}/", output: int = 0
) -> Edit:
    """Operators after an output of a node, each with a number as its second input, or none."""
    casts = {"half": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16, "int": ir.DataType.INT32}

    def plant(graph: ir.Graph) -> None:
        value = first = outer(graph, node_of(graph, op_type, place)).outputs[output]
        readers = list(first.uses())
        for kind, number in made:
            inputs: list[ir.Value | None] = [value]
            if number is not None:
                inputs.append(constant(graph, f"planted_{kind}_{number}", number))
            cast = casts.get(kind) or (ir.DataType.FLOAT if kind == "float" else None)
            value = insert(graph, "Cast" if cast else kind, inputs, {"to": cast} if cast else {})
        for use in readers:
            use.node.replace_input_with(use.idx, value)

    return plant


def as_float16(values: NDArray[Any]) -> NDArray[Any]:
    """Rounded to float16, or to bfloat16 where it is float16 already."""
    return values.astype(ml_dtypes.bfloat16 if values.dtype == np.float16 else np.float16)
