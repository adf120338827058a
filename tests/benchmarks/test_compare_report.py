"""The report holds every contender, failed ones with their reason, and needs no other file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.compare.charts import Point, scatter
from benchmarks.compare.figures import Measured
from benchmarks.compare.peers import contenders
from benchmarks.compare.report import write_report
from qrun.evaluation.charts import Bar, bars

CHOSEN = contenders(["llama_cpp:Q4_0", "openvino:int4"])
OURS, OTHERS = [c for c in CHOSEN if c.ours], [c for c in CHOSEN if not c.ours]


def measurement(peer: str, variant: str, number: int, seconds: float) -> dict[str, Any]:
    workload = {"prompt_tokens": 512, "generated_tokens": 64, "first_token_seconds": seconds}
    workload |= {"decode_seconds": seconds, "peak_rss_bytes": 5e8}
    result = {
        "load_seconds": 1.0,
        "first_answer_seconds": 1.5,
        "settings": {},
        "versions": {"python": "3.11"},
    }
    key = {"peer": peer, "variant": variant, "shape": "0.5b", "round": number}
    return {"key": key, "load_average": 0.3, "result": {**result, "workloads": [workload]}}


def rows_record(peer: str, variant: str, number: int, seconds: float) -> dict[str, Any]:
    record = measurement(peer, variant, number, seconds)
    record["result"]["rows"] = [{"rows": n, "steps": 10, "seconds": seconds} for n in (1, 2)]
    return record


def guesses_record(number: int, seconds: float) -> dict[str, Any]:
    record = measurement("qconvert", "int4", number, 1.0)
    timed = {"plain": 1.0, "guessing": seconds}
    record["result"]["guesses"] = [{"text": "quoting", "steps": 10, "same_tokens": 11, "seconds": timed}]
    return record


@pytest.fixture
def report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    facts = {"rounds": 2, "shapes": ["0.5b"], "prompts": [512], "generate": 64, "threads": 2}
    facts |= {"rows": [1, 2], "rows_prompt": 256}
    good = {"seconds": 2.0, "peak_bytes": 1e9, "model_bytes": 5e8, "load_average": 0.1}
    speed = {c.name: dict(good) for c in CHOSEN}
    speed["openvino int4"] = {"failed": "no such <operator>", "load_average": 0.1}
    measured = [measurement(c.peer.name, c.variant, n, 1.0) for n in (1, 2) for c in OURS]
    measured += [measurement("llama_cpp", "Q4_0", n, 0.5) for n in (1, 2)]
    figures = {"mean_kl": 0.1, "top1": 0.9, "perplexity": 20.0, "reference_perplexity": 19.0}
    quality = [
        {"key": {"peer": c.peer.name, "variant": c.variant, "text": "prose"}, "result": figures}
        for c in CHOSEN
        if c.name != "openvino int4"
    ]
    conversions = {"0.5b": speed, "sample": speed}
    together = [rows_record("qconvert", "int4", n, 1.0) for n in (1, 2)]
    together.append(
        {**rows_record("llama_cpp", "Q4_0", 1, 1.0), "failed": "llama_decode returned 1", "result": None}
    )
    del together[-1]["result"]
    guesses = [guesses_record(number, seconds) for number, seconds in ((1, 0.5), (2, 0.25))]
    records = Measured(measured, quality, together, guesses)
    write_report(tmp_path, facts, CHOSEN, conversions=conversions, records=records)
    capsys.readouterr()
    return tmp_path


def test_markdown_says_why_a_peer_failed_and_where_we_are_behind(report: Path) -> None:
    text = (report / "report.md").read_text()
    assert "failed: conversion: no such <operator>" in text
    behind = text[text.index("## Where we are not ahead") :]
    assert "| 0.5b, prompt of 512: prompt | qconvert int4 | llama.cpp Q4_0 | 0.50 |" in behind


def test_json_has_a_row_for_everyone_and_paired_ratios(report: Path) -> None:
    found = json.loads((report / "report.json").read_text())
    assert [(row["peer"], row["variant"]) for row in found["rows"]] == [
        (c.peer.name, c.variant) for c in CHOSEN if not c.quality_only
    ]
    assert len(found["quality"]) == len(CHOSEN)
    llama = next(row for row in found["rows"] if row["peer"] == "llama_cpp")
    assert llama["advantage"]["int4"]["prompt"] == 0.5
    assert llama["measures"]["prompt"]["rounds"] == {"1": 1024.0, "2": 1024.0}


def test_several_answers_and_several_tokens_have_their_tables(report: Path) -> None:
    text = (report / "report.md").read_text()
    together = text[text.index("several answers at once") :]
    assert "| **qconvert int4** | 10.0 (10.0 to 10.0) | 20.0 (20.0 to 20.0) | 2.00 |" in together
    assert "| llama.cpp Q4_0 | failed: llama_decode returned 1 |" in together
    guesses = text[text.index("## Several tokens a step") :]
    # The median of the rounds' ratios 2 and 4.
    assert "| quoting | 10.0 (10.0 to 10.0) | 30.0 (20.0 to 40.0) | 3.00 | all |" in guesses
    page = (report / "report.html").read_text()
    assert "Several answers at once" in page
    assert "Several tokens a step" in page
    found = json.loads((report / "report.json").read_text())
    assert len(found["together"]) == 3
    assert len(found["guesses"]) == 2


def test_page_is_one_file_for_any_width(report: Path) -> None:
    text = (report / "report.html").read_text()
    assert 'name="viewport" content="width=device-width' in text
    assert not re.findall(r'(?:src|href)="|url\(|@import', text)
    assert "no such &lt;operator&gt;" in text
    assert "no such <operator>" not in text


def test_charts_are_well_formed_and_failed_bars_say_so() -> None:
    drawn = bars("speed <1>", [Bar("a & b", 2.0, "2", 1.0, 3.0, ours=True), Bar("c", None)])
    tree = ElementTree.fromstring(drawn)
    assert "failed" in [text.text for text in tree.iter("text")]
    assert len(list(tree.iter("rect"))) == 1


def test_labels_of_a_scatter_plot_do_not_lie_on_each_other() -> None:
    points = [Point(f"engine {n}", 100.0, 0.1) for n in range(5)]
    tree = ElementTree.fromstring(scatter("quality", points, "MB", "KL"))
    places = [float(t.get("y", 0)) for t in tree.iter("text") if "point" in t.get("class", "")]
    assert len(places) == 5
    assert all(abs(a - b) >= 13 for i, a in enumerate(places) for b in places[:i])
