"""If these fail, a slip in a command for a cluster costs hours, or a user's file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qrun.batch.opening import Wanted
from qrun.errors import QrunError
from qrun.scaling.running import Cluster as Asked
from qrun.scaling.running import run_on_ray


def refused(order, engine, address="127.0.0.1:1"):
    with pytest.raises(QrunError) as refusal:
        run_on_ray(
            order,
            engine,
            Asked(address),
            places=(str(order.input), str(order.output)),
            opening={},
            literal=True,
            tell=lambda line: None,
        )
    return str(refusal.value)


def test_what_is_wrong_here_is_told_before_a_cluster_is_asked(order, model, tmp_path):
    assert "qconvert.json" in refused(order, tmp_path)
    order.output.write_text("mine")
    assert "the output exists already" in refused(order, model)
    assert order.output.read_text() == "mine"
    assert "no such folder" in refused(replace(order, output=tmp_path / "no" / "out"), model)


def test_what_is_wrong_with_the_input_is_told_in_one_message(run, order, tmp_path):
    for change, words in (
        ({"input": tmp_path / "none-*.jsonl"}, "there is no such file"),
        ({"input": tmp_path / "none.jsonl"}, "there is no such file"),
        ({"wanted": Wanted(column="zzz")}, "there is no column 'zzz'"),
        ({"wanted": Wanted(template="{{ broken")}, "the template cannot be read"),
        ({"output": tmp_path / "out.parquet"}, "JSON lines have no common columns"),
    ):
        with pytest.raises(QrunError, match=words):
            run(replace(order, **change))
    (tmp_path / "t.csv").write_text("answer,text\n1,hello\n")
    with pytest.raises(QrunError, match="has a column 'answer'"):
        run(replace(order, input=tmp_path / "t.csv", wanted=Wanted(column="text")))
    assert sorted(Path(each).name for each in tmp_path.iterdir()) == ["prompts.jsonl", "t.csv"]


@pytest.mark.parametrize("more", ["id,text,note\n3,hello,mine\n", "text\nhello\n"])
def test_files_of_other_columns_are_refused_and_not_cut(run, order, tmp_path, more):
    """What only a later file had was left out of the output in silence."""
    folder = tmp_path / "tables"
    folder.mkdir()
    (folder / "a.csv").write_text("id,text\n1,hello\n")
    (folder / "b.csv").write_text(more)
    with pytest.raises(QrunError, match=r"the files have different columns: '(note|id)'"):
        run(replace(order, input=folder, wanted=Wanted(column="text")))
    assert not order.output.exists()


@pytest.mark.parametrize("place", [0, 1])
def test_a_row_s_own_answer_is_not_overwritten(run, order, tmp_path, place):
    """Rows of JSON have columns of their own, which nobody looked at on a cluster."""
    folder = tmp_path / "rows"
    folder.mkdir()
    lines = ['{"prompt": "hello"}\n'] * 2
    lines[place] += '{"prompt": "hello", "answer": "mine"}\n'
    for name, line in zip("ab", lines):
        (folder / f"{name}.jsonl").write_text(line)
    with pytest.raises(QrunError, match="the input has a column 'answer'"):
        run(replace(order, input=folder))
    assert not order.output.exists()
    assert run(replace(order, input=folder, prefix="model_"))["answered"] == 3
