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
