"""If these fail, attention by groups may be wrong in an export that passes its proof."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from qconvert.proof import graph_check
from qrun.folder.manifest import read_manifest
from tests.qconvert.mutants import Exporter, edit_graph
from tests.qconvert.planted.edits import Edit
from tests.qconvert.planted.groups import GROUPS
from tests.tiny import make_tiny_checkpoint

INPUT = "attend_by_groups"
# With the two ways exchanged ONNX Runtime does not run the graph at all.
RUNNING = {kind: edit for kind, edit in GROUPS.items() if "exchanged" not in kind}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four query heads to a key/value head, and a context in which the proof's long text has its place."""
    return make_tiny_checkpoint(
        tmp_path_factory.mktemp("grouped") / "tiny",
        hidden_size=128,
        num_attention_heads=8,
        max_position_embeddings=1024,
        initializer_range=0.1,
    )


@pytest.fixture
def exporter(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Exporter:
    return Exporter(checkpoint, tmp_path, monkeypatch)


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_an_export_with_both_ways_passes_its_proof(exporter: Exporter, precision: str) -> None:
    folder = exporter.export(precision)
    assert INPUT in read_manifest(folder).raw["graph"]["inputs"]
    report = exporter.verify(folder)
    assert report.passed, report.failures()


def without_the_reading_of_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_check, "branch_faults", lambda node, layer: iter(()))
    monkeypatch.setitem(
        graph_check._ATTRIBUTES, ("com.microsoft", "FusedMatMul"), lambda node, due: _any(node)
    )


def _any(node: ir.Node) -> dict[str, tuple[object, ...]]:
    return {name: (graph_check._value(node, name),) for name in node.attributes}


@pytest.mark.parametrize("edit", list(RUNNING.values()), ids=list(RUNNING))
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_what_it_computes_is_compared_with_pytorch_too(
    exporter: Exporter, monkeypatch: pytest.MonkeyPatch, precision: str, edit: Edit
) -> None:
    """The lowering and the reading of its operators might share a mistake: logits show it by themselves."""
    folder = exporter.export(precision)
    edit_graph(folder, edit)
    without_the_reading_of_operators(monkeypatch)
    report = exporter.verify(folder)
    assert not report.passed
    assert all("If" not in each.where and "FusedMatMul" not in each.where for each in report.failed)


def test_a_window_or_few_heads_leave_the_kernel_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = make_tiny_checkpoint(tmp_path / "few")
    folder = Exporter(few, tmp_path, monkeypatch).export("fp32")
    assert INPUT not in read_manifest(folder).raw["graph"]["inputs"]
    assert all(node.op_type != "If" for node in ir.load(folder / "model.onnx").graph)
    windows = make_tiny_checkpoint(tmp_path / "windows", hidden_size=128, num_attention_heads=8, sliding=True)
    graph = ir.load(Exporter(windows, tmp_path, monkeypatch).export("fp32") / "model.onnx").graph
    (only,) = (node for node in graph if node.op_type == "If")
    assert "layers.0/" in str(only.name)
