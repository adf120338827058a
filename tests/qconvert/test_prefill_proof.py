"""If these fail, the proof does not see a fault of the second graph, or sees one where there is none."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from rich.console import Console

from qconvert.export import ExportOptions, export
from qconvert.progress import Progress
from qconvert.proof.exported_weights import ExportedWeights
from qconvert.proof.prefill_proof import prompt_weights
from qconvert.proof.report_view import summary
from qconvert.proof.verify import verify
from qrun.backends.ort.prefill import PrefillBinding
from tests.qconvert.planted.table import Subject
from tests.tiny import make_tiny_checkpoint

QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Subject, Path]:
    root = tmp_path_factory.mktemp("prefill")
    source = make_tiny_checkpoint(root / "tiny", tie_word_embeddings=False)
    options = ExportOptions(precision="int4", prefill=True, output=root / "m", verify=False)
    folder = export(str(source), options, QUIET).folder
    return Subject.of(source), folder


@pytest.fixture
def broken(made, tmp_path) -> Path:
    return Path(shutil.copytree(made[1], tmp_path / "broken"))


def prompt_failures(subject: Subject, folder: Path) -> list[str]:
    report = verify(folder, subject.checkpoint, subject.reference, QUIET)
    assert all("own graph" in failure.where or "prefill.onnx" in failure.where for failure in report.failed)
    return [f"{failure.where}: {failure.what}" for failure in report.failed]


def test_an_honest_second_graph_passes(made):
    report = verify(made[1], made[0].checkpoint, made[0].reference, QUIET)
    assert report.passed, report.failures()
    assert [path.case for path in report.paths if path.path == "prompt by its own graph"] == ["long"]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(summary(report))
    assert "…" not in console.export_text()  # no cell was cut


def test_a_wrong_weight_is_named(made, broken):
    graph = onnx.load(broken / "prefill.onnx", load_external_data=False).graph
    (matrix,) = (
        t for t in graph.initializer if t.name == "model.layers.1.mlp.down_proj.weight.int8_inputs.1"
    )
    offset = next(int(entry.value) for entry in matrix.external_data if entry.key == "offset")
    data = np.memmap(broken / "prefill.onnx.data", np.int8, "r+")
    data[offset] += 9
    data.flush()
    failures = prompt_failures(made[0], broken)
    assert any("prefill.onnx: model.layers.1.mlp.down_proj.weight: row 0" in line for line in failures)


@pytest.mark.parametrize(
    ("tensor", "named"),
    [
        ("model.layers.1.input_layernorm.weight", "model.layers.1.self_attn.q_proj.weight"),
        ("model.layers.0.post_attention_layernorm.weight", "model.layers.0.mlp.gate_proj.weight"),
        ("model.layers.1.mlp.up_proj.weight.int8_scales.1", "model.layers.1.mlp.down_proj.weight"),
        ("model.layers.1.mlp.down_proj.weight.int8_inputs_scales.1", "model.layers.1.mlp.down_proj.weight"),
    ],
)
def test_a_factor_that_its_readers_do_not_have_is_noticed(made, broken, tensor, named):
    """The factors of smoothing are read from norms and scales: a wrong one shows in what follows."""
    graph = onnx.load(broken / "prefill.onnx", load_external_data=False).graph
    (stored,) = (t for t in graph.initializer if t.name == tensor)
    place = {entry.key: entry.value for entry in stored.external_data}
    assert place["location"] == "prefill.onnx.data"
    values = np.memmap(broken / "prefill.onnx.data", np.float32, "r+", int(place["offset"]), (2,))
    values[1] *= 1.1
    values.flush()
    failures = prompt_failures(made[0], broken)
    assert any(f"prefill.onnx: {named}" in line and "rounding steps" in line for line in failures)


def test_the_second_graph_is_folded_and_the_first_is_not(made):
    """Else the tests above would hold for factors of 1 alone."""
    graphs = [made[1] / "model.onnx", made[1] / "prefill.onnx"]
    first, second = (
        ExportedWeights(graphs[0], made[0].reference.model),
        prompt_weights(graphs[1], made[0].reference.model),
    )
    name = "model.layers.1.mlp.up_proj.weight"
    assert name not in first.folding
    factors = second.folding.divided[name]
    assert float(factors.max() / factors.min()) > 1.5
    checkpoint = made[0].reference.model.state_dict()[name]
    step = checkpoint.abs().amax(-1, keepdim=True) / 127
    assert bool(((second.rows(name, slice(None)) - checkpoint).abs() < 2 * step).all())


def swapped_inputs(graph: onnx.GraphProto) -> None:
    """Gate and up multiplied by each other's weights: every stored tensor stays right."""
    readers = {node.input[1]: node for node in graph.node if node.op_type == "MatMulIntegerToFloat"}
    gates = [tensor for tensor in readers if ".gate_proj.weight.int8." in tensor]
    assert len(gates) == 4, "two layers of two parts; the last layer ends before its MLP"
    for gate in gates:
        up = gate.replace("gate_proj", "up_proj")
        one, other = readers[gate], readers[up]
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
