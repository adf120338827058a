"""If these fail, --draft takes what it should refuse, or does not tell what came true."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import qrun
from qrun.cli.main import main
from qrun.errors import QrunError
from tests.qrun.drafting import eager

Exporter = Callable[..., Path]


@pytest.fixture(scope="module")
def target(exporter: Exporter) -> Path:
    return exporter(max_position_embeddings=1024)


@pytest.fixture(scope="module", params=["rounded", "another"])
def draft(request: pytest.FixtureRequest, exporter: Exporter) -> Path:
    if request.param == "rounded":
        return exporter("int4", max_position_embeddings=1024)
    return exporter(seed=1, max_position_embeddings=1024)


def run(*words: str, stdin: str | None = None) -> Any:
    return CliRunner().invoke(main, [*words], input=stdin)


def test_the_commands_tell_what_came_true(target: Path, draft: Path) -> None:
    asked = ["--engine", str(target), "--draft", str(draft)]
    with eager():
        done = run("generate", *asked, "--prompt", "abcabc", "--raw", "--greedy", "--json", "-v")
        assert done.exit_code == 0, done.output
        assert '"guessed_tokens": 0' not in done.output
        assert "draft: tiny" in done.stderr
        done = run("bench", *asked, "-p", "8", "-n", "16", "-r", "1")
        assert done.exit_code == 0, done.output
        assert "guessed in steps of several tokens" in done.output
        assert "\ndraft: tiny, " in done.output
        done = run("bench", *asked, "-p", "8", "-n", "16", "-r", "1", "--json", "--speculate")
        assert done.exit_code == 0, done.output
        facts = json.loads(done.stdout)
        assert facts["draft"]["precision"] in ("fp32", "int8", "int4")
        done = run("chat", *asked, "--greedy", "--max-tokens", "8", stdin="hello\n/stats\n")
        assert done.exit_code == 0, done.output
        assert "came true" in done.output


def other_vocabulary(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    one, other = (text for text, key in vocabulary.items() if key in (97, 98))
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    path.write_text(json.dumps(content))


@pytest.fixture
def strange(target: Path, tmp_path: Path) -> Path:
    made = Path(shutil.copytree(target, tmp_path / "strange"))
    other_vocabulary(made)
    return made


def test_a_draft_of_another_vocabulary_is_refused_with_both_folders(target: Path, strange: Path) -> None:
    done = run("generate", "--engine", str(target), "--draft", str(strange), "--prompt", "a")
    assert done.exit_code == 1
    told = " ".join(done.stderr.split())
    assert "the draft has another vocabulary than the model: token 97 is " in told
    assert str(strange) in done.stderr.replace("\n", "")
    assert str(target) in done.stderr.replace("\n", "")
    assert "same tokenizer" in told
    with pytest.raises(QrunError, match="another vocabulary"):
        qrun.open(target).use_draft(strange)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "no such model folder"),
        ("file.txt", "neither a model folder nor a .onnx file nor a .plan"),
        ("empty", "is not a folder that qconvert made"),
        ("model.plan", "a draft is a model folder: a plan cannot guess for another model"),
        ("no tokenizer", "has no tokenizer.json"),
    ],
)
@pytest.mark.parametrize("command", [["generate", "--prompt", "a"], ["chat"], ["bench"]])
def test_what_is_no_draft_is_refused(
    target: Path, tmp_path: Path, name: str, message: str, command: list[str]
) -> None:
    path = tmp_path / name
    if name == "empty":
        path.mkdir()
    elif name == "no tokenizer":
        shutil.copytree(target, path)
        (path / "tokenizer.json").unlink()
    elif name != "nowhere":
        path.write_text("")
    done = run(*command, "--engine", str(target), "--draft", str(path), stdin="")
    assert done.exit_code == 1, done.output
    assert message in " ".join(done.stderr.split())


def test_a_bench_of_several_rows_takes_no_draft(target: Path) -> None:
    done = run("bench", "--engine", str(target), "--draft", str(target), "--rows", "2")
    assert done.exit_code == 2
    assert "--draft is for one answer at a time" in done.output
