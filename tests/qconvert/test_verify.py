"""Honest exports pass, for the right reasons; reports say what was found; the table is the documented one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from qconvert.cases import GREEDY_STEPS, LONG_TOKENS, make_cases
from qconvert.checkpoint import load_model, open_checkpoint
from qconvert.cli import main
from qconvert.compare import check_greedy, compare_rows, measure
from qconvert.errors import QconvertError
from qconvert.export import ExportOptions, export
from qconvert.limits import ENOUGH_FOR_SHARES, LIMITS, limits_table
from qconvert.progress import Progress
from qconvert.prompt_paths import CHUNKED, CHUNKED_GROWING, LAST, STEPPED, STEPS, TRIMMED_BACK, PathReader
from qconvert.quantize import PRECISIONS, BlockFormat, pack, unpack
from qconvert.reference import Reference
from qconvert.verify import Report, verify
from qconvert.weight_check import error_in_steps
from qrun.manifest import read_manifest
from qrun.session import open_session
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
    assert len(report.greedy.answer) == GREEDY_STEPS


def test_the_sample_keeps_what_is_promised(sample_checkpoint: Path, tmp_path: Path) -> None:
    made = export(str(sample_checkpoint), ExportOptions("int8", output=tmp_path / "model"), QUIET)
    assert made.report is not None
    prose = made.report.main_result
    assert (prose.case, prose.path, prose.tokens) == ("long", "whole", LONG_TOKENS)
    assert prose.measures["checkpoint"].mean_kl <= 0.02
    assert read_manifest(made.folder).verification == "passed"


# Paths through a session.


class CountingSession:
    """Logits that tell their position: one-hot rows at the position's index, as the cache has it."""

    def __init__(self, folder: Path) -> None:
        self._session = open_session(folder)
        self.manifest = self._session.manifest

    def new_cache(self, **options: Any) -> Any:
        return self._session.new_cache(**options)

    def forward(self, token_ids: Any, cache: Any, logits: str = "last") -> Any:
        start = cache.length
        self._session.forward(token_ids, cache, "none")
        rows = np.eye(512, dtype=np.float32)[start : cache.length]
        return {"all": rows, "last": rows[-1:], "none": rows[:0]}[logits][None]


@pytest.mark.parametrize(
    ("path", "first"), [(CHUNKED, 0), (CHUNKED_GROWING, 0), (STEPPED, 135), (TRIMMED_BACK, 176), (LAST, 199)]
)
def test_a_reader_gives_each_position_its_own_row(exporter: Exporter, path: Any, first: int) -> None:
    session = CountingSession(exporter.export("fp32"))
    reader = PathReader(path, session, list(range(200)))  # type: ignore[arg-type]
    seen = []
    for start in range(0, 200, 48):
        taken = reader.take(start, min(start + 48, 200))
        if taken is not None:
            begin, rows = taken
            assert rows.argmax(-1).tolist() == list(range(begin, begin + len(rows)))
            seen += rows.argmax(-1).tolist()
    assert seen == list(range(first, 200))


# Measures.


def test_measures_of_known_distributions() -> None:
    reference = torch.log(torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.25, 0.75]]))
    ours = torch.log(torch.tensor([[0.5, 0.5], [0.1, 0.9], [0.5, 0.5]])) + 1.0
    rows = compare_rows(10, reference, ours, torch.tensor([0, 1]))
    found = measure(rows, text=True)
    assert found.positions == 3
    kl = [0, 0.9 * np.log(9) - 0.1 * np.log(9), 0.25 * np.log(0.5) + 0.75 * np.log(1.5)]
    assert rows.kl == pytest.approx(kl, abs=1e-6)
    assert (found.max_kl, found.max_kl_at) == (pytest.approx(kl[1]), 11)
    assert (found.max_difference, found.max_difference_at) == (pytest.approx(1 + np.log(9)), 11)
    assert rows.agrees.tolist()[:2] == [1, 0]
    assert found.reference_perplexity == pytest.approx((0.5 * 0.1) ** -0.5)
    assert found.export_perplexity == pytest.approx((0.5 * 0.9) ** -0.5)
    assert measure(rows, text=False).perplexity_ratio is None


def test_a_row_that_is_not_finite_is_above_every_limit() -> None:
    reference = torch.zeros(3, 4)
    for bad in (float("nan"), float("inf"), float("-inf")):
        ours = reference.clone()
        ours[1, 2] = bad
        rows = compare_rows(0, reference, ours, torch.tensor([0, 0, 0]))
        assert rows.non_finite_at == 1
        assert rows.first_above("max_difference", 1e9) == 1


@pytest.mark.parametrize(
    ("gap", "outcome"), [(-1.0, "identical"), (0.0019, "near tie"), (0.0021, "different"), (3.0, "different")]
)
def test_a_near_tie_is_told_from_an_error(gap: float, outcome: str) -> None:
    # At step 2 token 5 was taken; PyTorch's logit of token 7 is larger by the gap.
    logits = torch.zeros(4, 10)
    logits[torch.arange(4), torch.tensor([1, 2, 5, 3])] = 8.0
    logits[2, 7] = 8.0 + gap
    check = check_greedy([1, 2, 5, 3], logits)
    assert check.outcome(2e-3) == outcome
    assert check.agreed == (4 if outcome == "identical" else 3)
    if outcome != "identical":
        assert check.first is not None
        assert (check.first.step, check.first.expected, check.first.taken) == (2, 7, 5)
        assert check.first.margin == pytest.approx(gap, abs=1e-5)


def test_one_wide_margin_is_not_hidden_by_a_near_tie_before_it() -> None:
    logits = torch.zeros(2, 3)
    logits[0, 1], logits[1, 2] = 1e-3, 5.0
    check = check_greedy([0, 0], logits)
    assert check.first is not None
    assert check.first.step == 0
    assert check.outcome(2e-3) == "different"


@pytest.mark.parametrize(
    "fmt", [BlockFormat(4, 32, False), BlockFormat(4, 16, True), BlockFormat(8, 64, True)]
)
def test_rounding_to_nearest_leaves_half_a_step(fmt: BlockFormat) -> None:
    weight = torch.randn(40, 200, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    weight[4] = weight[4].abs() + 1
    stored = unpack(pack(weight, fmt), fmt, 200)
    steps = error_in_steps(weight, stored, fmt)
    assert 0.45 < float(steps.max()) <= 0.501
    assert float(steps[3].max()) == 0
    stored[7, 33] += 1.1 * (weight[7].max() - weight[7].min()) / ((1 << fmt.bits) - 1)
    assert float(error_in_steps(weight, stored, fmt)[7].max()) > 0.501


# Cases.


def test_cases_of_a_folder_with_a_tokenizer(checkpoints: dict[str, Path]) -> None:
    found = make_cases(checkpoints["tied"], 320, 4096)
    lengths = {case.name: len(case.token_ids) for case in found.cases}
    assert lengths == {"short": 32, "long": LONG_TOKENS, "chinese": 128, "code": 160}
    assert LONG_TOKENS >= 512
    assert found.notes == ()
    assert all(case.text for case in found.cases)


def test_random_tokens_where_there_is_no_tokenizer_or_not_this_model_s(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    for folder, vocab_size in ((tmp_path, 320), (checkpoints["tied"], 100)):
        found = make_cases(folder, vocab_size, 4096)
        assert found == make_cases(folder, vocab_size, 4096)  # seeded
        assert "random tokens" in found.notes[0]
        assert not any(case.text for case in found.cases)
        assert max(max(case.token_ids) for case in found.cases) < vocab_size


def test_what_does_not_fit_the_context_is_said(checkpoints: dict[str, Path]) -> None:
    found = make_cases(checkpoints["tied"], 320, 100)
    assert {len(case.token_ids) for case in found.cases} == {32, 100}
    assert "long: cut to the context of 100 tokens" in found.notes
    assert len(found.greedy_prompt) + found.greedy_steps == 100
    assert any(note.startswith("greedy: 68 steps") for note in found.notes)


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
    report.write(tmp_path)
    raw = json.loads((tmp_path / "verification.json").read_text(encoding="utf-8"))
    assert raw["status"] == "passed"
    assert raw["reference"] == "float32"
    assert {entry["case"] for entry in raw["cases"]} == {"short", "long", "chinese", "code"}
    assert raw["greedy"]["judged_by"]["own weights"]["outcome"] in ("identical", "near tie")
    assert len(raw["greedy"]["answer"]) == GREEDY_STEPS
    text = (tmp_path / "verification.md").read_text(encoding="utf-8")
    assert "passed" in text.splitlines()[0]
    assert "| long | token by token |" in text
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(report.summary)
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


def test_a_failed_export_publishes_nothing_and_says_where(exporter: Exporter, tmp_path: Path) -> None:
    def transpose(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.0.self_attn.q_proj.weight"
        tensors[name].copy_(tensors[name].T.clone())

    folder = exporter.export_of_changed_weights("int8", transpose)
    report = exporter.verify(folder)
    text = report.failures()
    assert text.splitlines()[0].startswith("model.layers.0.self_attn.q_proj.weight: row 0")
    assert report.verdict()["status"] == "failed"


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


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
        verify(folder, Reference(load_model(open_checkpoint(exporter.checkpoint))), QUIET)
