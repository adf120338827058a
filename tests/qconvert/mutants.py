"""Exports with one mistake in them, as a bug in loading, lowering or writing would make it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import qconvert.export as flow
from qconvert.checkpoint.load import load_model, open_checkpoint
from qconvert.checkpoint.reference import Reference
from qconvert.export import ExportOptions, export
from qconvert.models.spec import DecoderSpec
from qconvert.progress import Progress
from qconvert.proof.report import Report
from qconvert.proof.verify import verify
from qrun.folder.entry import sha256_of
from qrun.folder.manifest import read_manifest

QUIET = Progress(quiet=True)


class Exporter:
    """Exports one checkpoint to a temporary folder, rightly or with a mistake, and verifies the result.

    The reference is always the checkpoint as it is.
    """

    def __init__(self, checkpoint: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.checkpoint = checkpoint
        self.reference = Reference(load_model(open_checkpoint(checkpoint)))
        self._scratch = scratch
        self._monkeypatch = monkeypatch

    def export(self, precision: str, **options: Any) -> Path:
        output = self._scratch / f"{self.checkpoint.name}-{precision}"
        chosen = ExportOptions(precision=precision, output=output, verify=False, **options)
        return export(str(self.checkpoint), chosen, QUIET).folder

    def export_with_recipe(self, recipe: str, name: str, replacement: object, **options: Any) -> Path:
        """``export_with`` of 4 bits by a recipe, with more options."""
        with self._monkeypatch.context() as patch:
            patch.setattr(flow, name, replacement)
            return self.export("int4", recipe=recipe, **options)

    def export_with(self, precision: str, name: str, replacement: object) -> Path:
        """Export while ``qconvert.export.<name>`` is something else, and only then."""
        with self._monkeypatch.context() as patch:
            patch.setattr(flow, name, replacement)
            return self.export(precision)

    def export_of_changed_weights(self, precision: str, change: Callable[[dict[str, Any]], None]) -> Path:
        """Export as if the weights had been loaded wrongly; ``change`` edits the tensors in place."""

        def load_wrongly(checkpoint: Any) -> Any:
            model = load_model(checkpoint)
            change({name: tensor.detach() for name, tensor in model.named_parameters()})
            return model

        return self.export_with(precision, "load_model", load_wrongly)

    def verify(self, folder: Path) -> Report:
        return verify(folder, open_checkpoint(self.checkpoint), self.reference, QUIET)


def wrong_rope_base(config: Any, length: int) -> Any:
    """``families.rope_tables`` with five times the base."""
    from copy import deepcopy

    from qconvert.models.families import rope_tables

    config = deepcopy(config)
    config.rope_parameters["rope_theta"] *= 5
    return rope_tables(config, length)


def spec_with(**changes: Any) -> Callable[[Any], DecoderSpec]:
    """``families.spec_of``, with other sizes in what it returns."""
    from qconvert.models.families import spec_of

    def changed(config: Any) -> DecoderSpec:
        spec = spec_of(config)
        return replace(spec, **{name: change(getattr(spec, name)) for name, change in changes.items()})

    return changed


def edit_graph(folder: Path, edit: Callable[[ir.Graph], None], name: str = "model.onnx") -> None:
    """Change a graph of a finished folder; its manifest knows nothing of it."""
    model = ir.load(folder / name)
    edit(model.graph)
    model.graph.sort()
    ir.save(model, folder / name)
    reseal(folder)


def attentions(graph: ir.Graph) -> list[ir.Node]:
    """All nodes of ``GroupQueryAttention``, also those in branches."""
    everywhere = ir.traversal.RecursiveGraphIterator(graph)
    return [node for node in everywhere if node.op_type == "GroupQueryAttention"]


def outer(graph: ir.Graph, node: ir.Node) -> ir.Node:
    """The node of the graph itself that a node is, or in whose branch it stands."""
    if node.graph is graph:
        return node
    for around in graph:
        for attribute in around.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH and node.graph is attribute.as_graph():
                return around
    raise AssertionError(f"{node.name} stands in no graph of this one")


def swap_key_heads(graph: ir.Graph) -> None:
    """Let the first layer's attention find the keys of key/value heads 0 and 1 in each other's place."""
    attention = attentions(graph)[0]
    packed = attention.inputs[0]
    queries, head_size = 64, 16  # the tiny model's: 4 query heads, 2 key/value heads of 16
    order = np.arange(queries + 4 * head_size)
    order[queries : queries + 2 * head_size] = np.roll(order[queries : queries + 2 * head_size], head_size)
    indices = ir.tensor(order, name="order")
    value = ir.Value(
        name="order", shape=indices.shape, type=ir.TensorType(ir.DataType.INT64), const_value=indices
    )
    graph.register_initializer(value)
    gather = ir.node("Gather", [packed, value], {"axis": 2}, name="swapped")
    gather.outputs[0].name = "swapped"
    graph.insert_before(outer(graph, attention), gather)
    attention.replace_input_with(0, gather.outputs[0])


def stored_at(folder: Path, initializer: str) -> tuple[Path, int, int]:
    """Where an initializer lies: data file, offset and length in bytes."""
    tensor = ir.load(folder / "model.onnx").graph.initializers[initializer].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    assert tensor.offset is not None
    assert tensor.length is not None
    return folder / "model.onnx.data", tensor.offset, tensor.length


def overwrite(folder: Path, initializer: str, start: int, content: bytes) -> None:
    """Replace bytes of an initializer, from ``start`` on."""
    path, offset, length = stored_at(folder, initializer)
    assert start + len(content) <= length
    with path.open("r+b") as file:
        file.seek(offset + start)
        assert file.read(len(content)) != content, "nothing would change"
        file.seek(offset + start)
        file.write(content)
    reseal(folder)


def reseal(folder: Path) -> None:
    """Make the manifest true again, as if the export itself had written these files."""
    raw = dict(read_manifest(folder).raw)
    raw["files"] = [
        {
            "path": entry["path"],
            "size": (folder / entry["path"]).stat().st_size,
            "sha256": sha256_of(folder / entry["path"]),
        }
        for entry in raw["files"]
    ]
    (folder / "qconvert.json").write_text(json.dumps(raw, indent=2), encoding="utf-8")
