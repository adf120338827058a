"""`qrun bench`: what is counted, and what it prints. No test looks at how fast anything is."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from qconvert.export import ExportOptions, export
from qconvert.progress import Progress
from qrun.backends.opening import open_session
from qrun.cli.bench import Measured, Round, Workload, measure, workloads
from qrun.cli.bench_view import as_table
from qrun.cli.main import main
from qrun.errors import QrunError
from tests.tiny import make_tiny_checkpoint

KEYS = {
    "prompt_tokens",
    "generated_tokens",
    "prefill_tokens_per_second",
    "decode_tokens_per_second",
    "load_seconds",
    "peak_rss_bytes",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bench")
    checkpoint = make_tiny_checkpoint(root / "tiny")
    options = ExportOptions(precision="int8", output=root / "model", verify=False)
    return export(str(checkpoint), options, Progress(quiet=True)).folder


def run(*arguments: object):
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


def test_rates_are_new_tokens_over_their_own_seconds() -> None:
    measured = Measured(
        Workload(100, 11, 50), (Round(2.0, 5.0, 2.1), Round(4.0, 1.0, 4.1), Round(1.0, 2.0, 1.1))
    )
    row = measured.to_json()
    assert row["prefill_tokens_per_second"] == 50  # the depth is not read again
    assert row["prefill_range"] == [25, 100]
    assert row["decode_tokens_per_second"] == 5  # ten steps follow the first token
    assert row["seconds_per_output_token"] == 0.2
    assert row["time_to_first_token"] == 2.1


def test_a_single_token_has_no_decode_rate() -> None:
    row = Measured(Workload(8, 1), (Round(1.0, 0.1, 1.0),)).to_json()
    assert row["decode_tokens_per_second"] is None


def test_figures_of_several_rows_fit_into_80_columns() -> None:
    rounds = (Round(1.6, 3.3, 2.1), Round(1.66, 3.31, 2.2))
    measured = [Measured(Workload(2_048, 64, depth=30_720, rows=8), rounds)]
    console = Console(width=80, file=io.StringIO())
    console.print(as_table(measured))
    heads, figures = console.file.getvalue().splitlines()
    assert heads.split()[-2:] == ["first", "token"]
    assert figures.split()[4:] == ["10,055", "(9,870-10,240)", "152", "(152-153)", "2,150", "ms"]


def test_every_round_does_the_same_work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = open_session(folder)
    fed: list[tuple[int, int]] = []
    real = session.forward

    def watched(token_ids, cache, logits="last"):
        fed.append((cache.length, token_ids.shape[1]))
        return real(token_ids, cache, logits)

    monkeypatch.setattr(session, "forward", watched)
    *_, measured = measure(session, Workload(20, 4, depth=10), repetitions=2, chunk=16)
    one_round = [(10, 6), (16, 14), (30, 1), (31, 1), (32, 1)]
    assert fed == [(0, 10)] + 3 * one_round  # a warm-up and two rounds
    assert len(measured.rounds) == 2


def test_several_rows_are_timed_while_all_of_them_decode(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_session(folder)
    fed: list[tuple[int, int, int]] = []
    real = session.forward

    def watched(token_ids, cache, logits="last"):
        fed.append((int(cache.lengths[0]), *token_ids.shape))
        return real(token_ids, cache, logits)

    monkeypatch.setattr(session, "forward", watched)
    *_, measured = measure(session, Workload(20, 4, depth=8, rows=3), repetitions=2, chunk=32)
    depths = [(0, 1, 8)] * 3
    reading = [(8, 1, 20), (28, 1, 1), (8, 1, 20), (29, 2, 1), (8, 1, 20)]
    timed = [(30, 3, 1), (31, 3, 1), (32, 3, 1)]  # three steps follow the first tokens
    assert fed == depths + 3 * (reading + timed)
    assert len(measured.rounds) == 2


def test_several_rows_may_fill_the_context(folder: Path) -> None:
    *_, measured = measure(open_session(folder), Workload(200, 49, rows=8), repetitions=1)
    assert len(measured.rounds) == 1


def test_rates_of_several_rows_are_of_all_together() -> None:
    measured = Measured(Workload(100, 11, rows=4), (Round(2.0, 5.0, 1.5),))
    row = measured.to_json()
    assert row["rows"] == 4
    assert row["prefill_tokens_per_second"] == 200
    assert row["decode_tokens_per_second"] == 8
    assert row["seconds_per_output_token"] == 0.5  # of one answer


def test_rows_are_an_option_and_a_column(folder: Path) -> None:
    result = run("--engine", folder, "-p", 8, "-n", 4, "-r", 1, "--rows", "1,2,8")
    assert result.exit_code == 0, result.output
    assert result.stdout.split()[:4] == ["rows", "depth", "prompt", "new"]
    assert [line.split()[0] for line in result.stdout.splitlines()[1:4]] == ["1", "2", "8"]
    assert max(map(len, result.stdout.splitlines()[:4])) <= 80


def test_lists_give_every_combination() -> None:
    assert workloads([1, 2], [3], [0, 5]) == [
        Workload(1, 3, 0), Workload(2, 3, 0), Workload(1, 3, 5), Workload(2, 3, 5)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "workload",
    [
        Workload(0, 4),
        Workload(4, 0),
        Workload(4, 4, -1),
        Workload(200, 60),
        Workload(4, 4, rows=0),
        Workload(200, 50, rows=8),  # the first one decodes while the others' prompts are read
    ],
)
def test_what_cannot_be_measured_is_refused(folder: Path, workload: Workload) -> None:
    with pytest.raises(QrunError, match=r"is 0|is -1|exceed the context of 256"):
        list(measure(open_session(folder), workload, repetitions=1))


def test_json_is_one_object_with_conditions(folder: Path) -> None:
    result = run("--engine", folder, "-p", "8,16", "-n", 4, "-r", 2, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [row["prompt_tokens"] for row in found["results"]] == [8, 16]
    assert all(row.keys() >= KEYS for row in found["results"])
    assert found["machine"]["cpu"]
    assert found["model"]["precision"] == "int8"
    assert len(found["model"]["sha256"]) == 64
    assert {"python", "onnxruntime", "numpy"} <= found["versions"].keys()


def test_csv_has_a_line_for_each_workload(folder: Path) -> None:
    result = run("--engine", folder, "-p", 8, "-n", "4,6", "-r", 1, "--csv")
    assert result.exit_code == 0, result.output
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [row["generated_tokens"] for row in rows] == ["4", "6"]
    assert rows[0].keys() >= KEYS


def test_the_table_fits_80_columns(folder: Path) -> None:
    result = run("--engine", folder, "-p", "8,100", "-n", 4, "-r", 2)
    assert result.exit_code == 0, result.output
    assert "prompt tokens/s" in result.output
    assert max(map(len, result.stdout.splitlines()[:4])) <= 80
    assert result.stdout.split()[:3] == ["depth", "prompt", "new"]  # headings were once cut to "dep…"


def test_bad_options(folder: Path) -> None:
    assert run("--engine", folder, "-p", "many").exit_code == 2
    assert run("--engine", folder, "--json", "--csv").exit_code == 2
    assert run("--engine", folder, "-p", 500).exit_code == 1
