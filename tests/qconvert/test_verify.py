"""Honest exports pass, for the right reasons; reports say what was found; the table is the documented one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from qconvert.errors import QconvertError
from qconvert.export import ExportOptions, export
from qconvert.progress import Progress
from qconvert.proof.cases import GREEDY_STEPS, LONG_TOKENS
from qconvert.proof.limits import ENOUGH_FOR_SHARES, LIMITS, limits_table
from qconvert.proof.paths import STEPS
from qconvert.proof.report_view import summary, write_report
from qconvert.proof.verify import Report
from qconvert.recipes.precisions import PRECISIONS
from qrun.folder.manifest import read_manifest
from tests.qconvert.building import run
from tests.qconvert.mutants import Exporter, overwrite
from tests.tiny import make_tiny_checkpoint

DOCS = Path(__file__).resolve().parents[2] / "docs"
QUIET = Progress(quiet=True)
MODELS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
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
    return Exporter(checkpoints["tied"], tmp_path, monkeypatch)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", MODELS)
def test_an_honest_export_passes(
    checkpoints: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    precision: str,
) -> None:
    exporter = Exporter(checkpoints[name], tmp_path, monkeypatch)
    report = exporter.verify(exporter.export(precision))
    assert report.passed, report.failures()
    assert report.weights.tensors == len({**exporter.reference.model.state_dict()}) - (name != "untied")
    compared_with = {"checkpoint"} if precision == "fp32" else {"checkpoint", "own weights"}
    assert all(set(path.measures) == compared_with for path in report.paths)
    if precision == "fp32":
        assert max(path.measures["checkpoint"].max_difference for path in report.paths) < 1e-4
        assert report.greedy.checks["checkpoint"].outcome(0.0) == "identical"
    elif precision == "int4":  # the comparison with its own weights does not feel how coarse they are
        whole = report.main_result.measures
        assert whole["own weights"].mean_kl < whole["checkpoint"].mean_kl / 10
    paths = {(path.case, path.path): path.measures["checkpoint"].positions for path in report.paths}
    assert paths["long", "whole"] == 256
    assert paths["long", "token by token"] == paths["chinese", "token by token, growing cache"] == STEPS + 1
    assert sum(len(answer.tokens) for answer in report.greedy.answers) == GREEDY_STEPS


@pytest.mark.slow_docs  # what the pages say of the sample: `make test-docs`
def test_the_sample_keeps_what_is_promised(sample_checkpoint: Path, tmp_path: Path) -> None:
    made = export(str(sample_checkpoint), ExportOptions("int8", output=tmp_path / "model"), QUIET)
    assert made.report is not None
    prose = made.report.main_result
    assert (prose.case, prose.path, prose.tokens) == ("long", "whole", LONG_TOKENS)
    assert prose.measures["checkpoint"].mean_kl <= 0.02
    assert read_manifest(made.folder).verification == "passed"


def test_a_folder_without_tokenizer_is_verified_on_random_tokens(tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "model", tokenizer=False, max_position_embeddings=48)
    made = export(str(checkpoint), ExportOptions("int8", output=tmp_path / "out"), QUIET)
    assert made.report is not None
    assert "random tokens" in made.report.notes[0]
    assert all(path.measures["checkpoint"].export_perplexity is None for path in made.report.paths)


# The report, the limits and the command.


@pytest.fixture
def report(exporter: Exporter) -> Report:
    return exporter.verify(exporter.export("int8"))


def test_the_report_is_json_markdown_and_a_narrow_table(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path)
    raw = json.loads((tmp_path / "verification.json").read_text(encoding="utf-8"))
    assert raw["status"] == "passed"
    assert raw["reference"] == "float32"
    assert {entry["case"] for entry in raw["cases"]} == {"short", "long", "chinese", "code"}
    assert raw["greedy"]["judged_by"]["own weights"]["outcome"] in ("identical", "near tie")
    assert sum(len(answer["tokens"]) for answer in raw["greedy"]["answers"]) == GREEDY_STEPS
    text = (tmp_path / "verification.md").read_text(encoding="utf-8")
    assert "passed" in text.splitlines()[0]
    assert "| long | token by token |" in text
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(summary(report))
    shown = console.export_text()
    assert "…" not in shown  # no cell was cut
    assert "PASSED" in shown
    verdict = report.verdict()
    assert verdict["status"] == "passed"
    assert verdict["mean_kl"] == raw["cases"][3]["compared_with"]["checkpoint"]["mean_kl"]


def test_the_documented_limits_are_the_code_s() -> None:
    assert limits_table() in (DOCS / "verification.md").read_text(encoding="utf-8")


def test_every_precision_has_every_sharp_limit_and_each_limit_its_reason() -> None:
    for precision in PRECISIONS:
        limited = {limit.key for limit in LIMITS if precision in limit.values}
        assert {"weight_steps", "near_tie"} <= limited
        assert "max_difference" in limited or {"mean_kl", "max_kl"} <= limited
    assert all(len(limit.reason) > 40 for limit in LIMITS)
    assert all(limit.breaks(float("nan"), name) for limit in LIMITS for name in limit.values)
    assert LONG_TOKENS > ENOUGH_FOR_SHARES


def test_failures_name_the_tensor_first(exporter: Exporter) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"

    def transpose(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].copy_(tensors[name].T.clone())

    report = exporter.verify(exporter.export_of_changed_weights("int8", transpose))
    assert report.failures().splitlines()[0].startswith(f"{name}: blocks are off by")
    assert report.verdict()["status"] == "failed"


def test_the_command_proves_a_finished_folder_and_leaves_it_alone(exporter: Exporter) -> None:
    folder = exporter.export("fp32")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    result = run("verify", folder, "--reference", exporter.checkpoint, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["status"] == "passed"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_command_writes_its_verdict_when_asked(exporter: Exporter) -> None:
    folder = exporter.export("fp32")
    assert read_manifest(folder).verification == "not verified"
    for _ in range(2):  # the second time the reports are there already
        result = run("verify", folder, "--reference", exporter.checkpoint, "--write")
        assert result.exit_code == 0, result.output
        manifest = read_manifest(folder)
        assert manifest.verification == "passed"
        manifest.check_files(hashes=True)
        assert {entry.path for entry in manifest.files} >= {"verification.json", "verification.md"}
        assert {path.name for path in folder.iterdir()} == {
            *(entry.path for entry in manifest.files),
            "qconvert.json",
        }


def test_the_command_fails_on_a_wrong_folder(exporter: Exporter) -> None:
    folder = exporter.export("fp32")
    overwrite(folder, "model.layers.0.mlp.up_proj.weight", 400, b"\0\0\x80\x3f")
    result = run("verify", folder, "--reference", exporter.checkpoint)
    assert result.exit_code == 1
    assert "FAILED" in result.output
    assert "model.layers.0.mlp.up_proj.weight: row 1" in result.output


def test_the_command_refuses_altered_files_and_other_checkpoints(exporter: Exporter, tmp_path: Path) -> None:
    folder = exporter.export("fp32")
    other = make_tiny_checkpoint(tmp_path / "other", num_hidden_layers=2)
    result = run("verify", folder, "--reference", other)
    assert result.exit_code == 1
    assert "its num_hidden_layers is 2, the folder's is 3" in result.output
    data = bytearray((folder / "model.onnx.data").read_bytes())
    data[5000] ^= 1
    (folder / "model.onnx.data").write_bytes(data)
    result = run("verify", folder, "--reference", exporter.checkpoint)
    assert result.exit_code == 1
    assert "model.onnx.data is altered" in result.output


def test_a_precision_without_limits_is_refused(exporter: Exporter) -> None:
    folder = exporter.export("fp32")
    manifest = folder / "qconvert.json"
    manifest.write_text(
        manifest.read_text(encoding="utf-8").replace('"precision": "fp32"', '"precision": "int2"')
    )
    with pytest.raises(QconvertError, match='no limits for the precision "int2"'):
        exporter.verify(folder)
