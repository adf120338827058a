"""If these fail, an int8 KV cache is scaled wrongly, or the proof does not notice that it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner

from qconvert.calibration.kv_scales import MARGIN, scale_of
from qconvert.checkpoint.kv_observers import LARGEST, Observed, Rounded
from qconvert.checkpoint.reference import Reference
from qconvert.cli import main
from qconvert.errors import QconvertError
from qconvert.formats.stored import kv_scale_name
from qconvert.models.families import rope_tables
from qconvert.proof.report import Report
from tests.qconvert.mutants import Exporter, attentions, edit_graph
from tests.tiny import make_tiny_checkpoint

MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    # Its keys and values differ so much in size that exchanged scales are far beyond the limits.
    "uneven": {"seed": 1},
    "sliding": {"sliding": True},
    "yarn": {"yarn": True},
    "bfloat16": {"dtype": "bfloat16", "num_key_value_heads": 4},
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: make_tiny_checkpoint(root / name, **settings) for name, settings in MODELS.items()}


@pytest.fixture
def exporter(checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Exporter:
    return Exporter(checkpoints["plain"], tmp_path, monkeypatch)


# Scales.


def test_both_channels_of_a_pair_get_its_length() -> None:
    """A key's pair turns with the position: a range by channel would hold at the positions seen alone."""
    observed = Observed()
    keys = torch.zeros(1, 1, 2, 8)
    keys[0, 0, 1, 2], keys[0, 0, 1, 6] = 3.0, -4.0
    values = torch.arange(16.0).view(1, 1, 2, 8) - 9
    returned = observed.cache([2]).update(keys, values, 5)
    assert returned[0] is keys
    assert returned[1] is values
    assert observed.largest[5, "key"].tolist() == [[0, 0, 5, 0, 0, 0, 5, 0]]
    assert observed.largest[5, "value"].tolist() == [[9, 8, 7, 6, 5, 4, 5, 6]]


def test_a_batch_s_padding_is_not_looked_at() -> None:
    observed = Observed()
    states = torch.tensor([1.0, 2.0, 3.0, 100.0]).view(1, 1, 4, 1).expand(2, 1, 4, 2)
    observed.cache([3, 1]).update(states, states, 0)
    assert observed.largest[0, "value"].tolist() == [[3, 3]]


def test_a_scale_leaves_room_and_is_never_nothing() -> None:
    scales = scale_of(torch.tensor([LARGEST / MARGIN, 0.0, float("inf"), float("nan")]))
    torch.testing.assert_close(scales, torch.ones(4))


def test_codes_are_rounded_to_the_nearest_even_and_cut_off_at_the_ends() -> None:
    states = torch.tensor([0.5, 1.5, -2.5, 200.0, -200.0, 126.6]).view(1, 1, 1, 6)
    stored, _ = Rounded(lambda layer, part: torch.full((1, 6), 2.0)).cache([1]).update(states * 2, states, 0)
    assert stored.flatten().tolist() == [0, 4, -4, 254, -256, 254]


def test_no_position_takes_a_key_beyond_its_scale(exporter: Exporter) -> None:
    """Also where the calibration text never came: the tables' last positions."""
    folder = exporter.export("fp32", int8_kv_cache=True)
    scale = torch.from_numpy(scales_of(folder)[kv_scale_name(1, "key")].copy())[0, :, 0]
    seen: list[torch.Tensor] = []
    model = exporter.reference.model
    handle = model.model.layers[1].self_attn.k_proj.register_forward_hook(
        lambda module, inputs, output: seen.append(output.view(-1, *scale.shape))
    )
    exporter.reference.hidden_states([list(range(1, 200))])
    handle.remove()
    first, second = seen[0].chunk(2, dim=-1)
    cos, sin = (torch.from_numpy(table[-1:]) for table in rope_tables(model.config, 256))
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    assert float((turned.abs() / (scale * LARGEST)).max()) < 1.5


# The export.


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("name", MODELS)
def test_an_honest_export_passes(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, precision: str
) -> None:
    exporter = Exporter(checkpoints[name], tmp_path, monkeypatch)
    report = exporter.verify(exporter.export(precision, prefill=precision == "int4", int8_kv_cache=True))
    assert report.passed, report.failures()
    if precision == "fp32":  # PyTorch with a rounded cache gives the very same
        worst = max(path.measures["own weights"].max_kl for path in report.paths)
        assert worst < min(path.measures["checkpoint"].max_kl for path in report.paths) / 10


def test_the_option_stands_in_the_manifest(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    facts = {}
    for kind in ("float", "int8"):
        result = run(checkpoints["plain"], "--precision", "int8", "--kv-cache", kind, "-o", tmp_path / kind)
        assert result.exit_code == 0, result.output
        facts[kind] = json.loads((tmp_path / kind / "qconvert.json").read_text())
    assert facts["int8"]["recipe"]["kv_cache"] == facts["int8"]["kv_cache"]["dtype"] == "int8"
    assert facts["float"]["recipe"]["kv_cache"] is None
    assert facts["float"]["kv_cache"]["bytes_per_token"] == 4 * facts["int8"]["kv_cache"]["bytes_per_token"]


@pytest.mark.parametrize(
    "options",
    [["--precision", "fp16"], ["--target", "tensorrt"], ["--target", "tensorrt", "--precision", "int4"]],
    ids=str,
)
def test_what_cannot_read_such_a_cache_is_refused(
    checkpoints: dict[str, Path], tmp_path: Path, options: list[str]
) -> None:
    result = run(checkpoints["plain"], "--kv-cache", "int8", "-o", tmp_path / "m", *options)
    assert result.exit_code == 1
    assert "--kv-cache int8 is not for" in result.output
    assert not (tmp_path / "m").exists()


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["export", *map(str, arguments)])


# The proof.


def scales_of(folder: Path) -> dict[str, np.ndarray]:
    graph = ir.load(folder / "model.onnx").graph
    return {
        name: value.const_value.numpy()
        for name, value in graph.initializers.items()
        if name.endswith("_scale") and "self_attn" in name and value.const_value is not None
    }


def rescale(folder: Path, change: dict[str, np.ndarray], graph_name: str = "model.onnx") -> None:
    """Replace scales; the data files and other graphs are left alone."""

    def edit(graph: ir.Graph) -> None:
        for name, scale in change.items():
            graph.initializers[name].const_value = ir.tensor(scale, name=name)

    edit_graph(folder, edit, graph_name)


def named(report: Report) -> set[str]:
    return {fault.tensor for fault in report.weights.faults}


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("part", ["key", "value"])
@pytest.mark.parametrize("factor", [0.1, 25.0], ids=["too small", "too large"])
def test_a_wrong_scale_is_named(exporter: Exporter, precision: str, part: str, factor: float) -> None:
    """PyTorch with the export's own scales would not tell, and int4 would hide it from the rest."""
    folder, name = exporter.export(precision, int8_kv_cache=True), kv_scale_name(1, part)
    scale = scales_of(folder)[name].copy()
    scale[0, 1, 0, 3] *= factor
    rescale(folder, {name: scale})
    report = exporter.verify(folder)
    assert not report.passed
    assert named(report) == {name}
    assert "head 1, channel 3" in report.failures()


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_scales_that_the_graph_exchanges_show_in_the_logits(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    def exchange(graph: ir.Graph) -> None:
        attention = attentions(graph)[0]
        key, value = attention.inputs[12], attention.inputs[13]
        attention.replace_input_with(12, value)
        attention.replace_input_with(13, key)

    exporter = Exporter(checkpoints["uneven"], tmp_path, monkeypatch)
    folder = exporter.export(precision, int8_kv_cache=True)
    edit_graph(folder, exchange)
    report = exporter.verify(folder)
    assert not report.passed
    assert not named(report)
    computed = [each.where for each in report.failed if "GroupQueryAttention" not in each.where]
    assert any(", " in where for where in computed), report.failed


def test_graphs_that_do_not_share_their_scales_are_noticed(exporter: Exporter) -> None:
    """What the second graph stored, the first one would read as something else."""
    folder, name = exporter.export("int4", prefill=True, int8_kv_cache=True), kv_scale_name(0, "value")
    rescale(folder, {name: scales_of(folder)[name] * np.float32(1.2)}, "prefill.onnx")
    report = exporter.verify(folder)
    assert named(report) == {f"prefill.onnx: {name}"}


def test_scales_of_another_shape_are_refused(exporter: Exporter) -> None:
    folder, name = exporter.export("fp32", int8_kv_cache=True), kv_scale_name(2, "key")
    rescale(folder, {name: np.ones((1, 1, 1, 16), dtype=np.float32)})
    with pytest.raises(QconvertError, match="due is float32"):
        exporter.verify(folder)


def test_the_watched_reference_answers_as_before(exporter: Exporter) -> None:
    tokens = [[1, 2, 3, 4, 5], [6, 7]]
    watched = Reference(exporter.reference.model, kv=Observed())
    for found, due in zip(watched.hidden_states(tokens), exporter.reference.hidden_states(tokens)):
        torch.testing.assert_close(found, due, atol=0, rtol=0)
