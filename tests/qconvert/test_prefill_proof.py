"""If these fail, the proof does not see a fault of the second graph, or sees one where there is none."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from qconvert.checkpoint import load_model, open_checkpoint
from qconvert.export import ExportOptions, export
from qconvert.progress import Progress
from qconvert.reference import Reference
from qconvert.verify import verify
from qrun.ort_prefill import PrefillBinding
from tests.tiny import make_tiny_checkpoint

QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Reference, Path]:
    root = tmp_path_factory.mktemp("prefill")
    source = make_tiny_checkpoint(root / "tiny", tie_word_embeddings=False)
    options = ExportOptions(precision="int4", prefill=True, output=root / "m", verify=False)
    folder = export(str(source), options, QUIET).folder
    return Reference(load_model(open_checkpoint(source))), folder


@pytest.fixture
def broken(made, tmp_path) -> Path:
    return Path(shutil.copytree(made[1], tmp_path / "broken"))


def prompt_failures(reference: Reference, folder: Path) -> list[str]:
    report = verify(folder, reference, QUIET)
    assert all("own graph" in failure.where or "prefill.onnx" in failure.where for failure in report.failed)
    return [f"{failure.where}: {failure.what}" for failure in report.failed]


def test_an_honest_second_graph_passes(made):
    report = verify(made[1], made[0], QUIET)
    assert report.passed, report.failures()
    assert [path.case for path in report.paths if path.path == "prompt by its own graph"] == ["long"]


def test_a_wrong_weight_is_named(made, broken):
    graph = onnx.load(broken / "prefill.onnx", load_external_data=False).graph
    (matrix,) = (t for t in graph.initializer if t.name == "model.layers.1.mlp.down_proj.weight.int8.2")
    offset = next(int(entry.value) for entry in matrix.external_data if entry.key == "offset")
    data = np.memmap(broken / "prefill.onnx.data", np.int8, "r+")
    data[offset] += 9
    data.flush()
    failures = prompt_failures(made[0], broken)
    assert any("prefill.onnx: model.layers.1.mlp.down_proj.weight: row 0" in line for line in failures)


def swapped_inputs(graph: onnx.GraphProto) -> None:
    """Gate and up multiplied by each other's weights: every stored tensor stays right."""
    for layer in range(2):
        for group in range(4):
            nodes = {
                tensor: next(node for node in graph.node if tensor in node.input)
                for tensor in (
                    f"model.layers.{layer}.mlp.{part}_proj.weight.int8.{group}" for part in ("gate", "up")
                )
            }
            (gate, one), (up, other) = nodes.items()
            one.input[1], other.input[1] = up, gate
            one.input[3], other.input[3] = other.input[3], one.input[3]


def test_a_wrong_graph_over_right_weights_fails(made, broken):
    model = onnx.load(broken / "prefill.onnx", load_external_data=False)
    swapped_inputs(model.graph)
    onnx.save(model, broken / "prefill.onnx")
    failures = prompt_failures(made[0], broken)
    assert any("long, prompt by its own graph" in line and "own weights" in line for line in failures)


def test_tokens_at_a_wrong_place_fail(made, monkeypatch):
    run = PrefillBinding.run
    monkeypatch.setattr(
        PrefillBinding, "run", lambda self, tokens, cache: run(self, np.roll(tokens, 1), cache)
    )
    assert any("long, prompt by its own graph" in line for line in prompt_failures(*made))
