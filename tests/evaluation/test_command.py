"""If these fail, ``qrun eval`` shows other figures than it has found, or a page that a text can take over."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from qrun.evaluation.asking import Result
from qrun.evaluation.page import page as html_page
from qrun.evaluation.report import Report
from qrun.evaluation.summary import measures
from qrun.evaluation.tasks import read_tasks
from tests.commands import qrun
from tests.evaluation.writing import data
from tests.fakes import REPOSITORY

LINES = [
    {"id": "a", "group": "facts", "prompt": "x", "expected": "zzz"},
    {"id": "b", "group": "facts", "prompt": "y", "expected": ".", "match": "regex"},
    {"id": "c", "group": "sums", "prompt": "z", "choices": ["one", "two"], "expected": 0},
    {"id": "d", "text": "The quick brown fox jumps over the lazy dog."},
]
GREEDY = ("--threads", 1, "--max-tokens", 4)


@pytest.fixture(scope="module")
def compared(tmp_path_factory, exporter, tiny_export):
    """The report of two folders as JSON, the table of the same, and the page."""
    folder = tmp_path_factory.mktemp("evaluation")
    path, other = data(folder / "data.jsonl", *LINES), exporter("int8", max_position_embeddings=1024)
    arguments = ("eval", "--engine", tiny_export, "--against", other, path, *GREEDY)
    found = qrun(*arguments, "--json", "--page", folder / "page.html")
    table = qrun(*arguments, "--rows", 2)
    assert found.exit_code == table.exit_code == 0, (found.output, table.output)
    return json.loads(found.stdout), table.stdout, (folder / "page.html").read_text()


def test_the_object_holds_every_line_of_every_folder(compared):
    found, _, _ = compared
    assert [each["name"] for each in found["lines"]] == ["a", "b", "c", "d"]
    assert all(len(each["results"]) == 2 for each in found["lines"])
    assert [each["measure"] for each in found["measures"]] == [
        "contains",
        "regex",
        "choice",
        "probability",
        "perplexity",
    ]
    assert [each["precision"] for each in found["folders"]] == ["fp32", "int8"]
    assert all(len(each["sha256"]) == 64 for each in found["folders"])
    for measure in found["measures"]:
        first, second = measure["folders"]
        assert "change" not in first
        assert second["change"]["low"] <= second["change"]["value"] <= second["change"]["high"]
    text = found["lines"][-1]["results"][0]
    perplexity = found["measures"][-1]["folders"][0]["value"]
    assert perplexity == pytest.approx(2.718281828 ** (text["nats"] / text["tokens"]), rel=1e-4)


def test_the_table_has_the_same_figures_in_80_columns(compared):
    found, table, _ = compared
    assert max(map(len, table.splitlines())) <= 80
    assert f"{found['measures'][-1]['folders'][0]['value']:,.2f}" in table or "perplexity" in table
    assert "no line changed" in table
    assert "contains: the answer holds the expected text, 1 line\n" in table
    assert "\x1b" not in table


def test_the_same_command_finds_the_same(tmp_path, tiny_export):
    path = data(tmp_path / "data.jsonl", *LINES)
    first, second = (
        json.loads(qrun("eval", "--engine", tiny_export, path, *GREEDY, "--json").stdout) for _ in "12"
    )
    assert first["measures"] == second["measures"]
    assert first["lines"] == second["lines"]


def test_a_page_is_replaced_by_force_alone(tmp_path, tiny_export):
    path, page = data(tmp_path / "data.jsonl", LINES[3]), tmp_path / "page.html"
    page.write_text("mine")
    arguments = ("eval", "--engine", tiny_export, path, *GREEDY, "--page", page)
    assert qrun(*arguments).exit_code == 1
    assert page.read_text() == "mine"
    assert qrun(*arguments, "--force").exit_code == 0
    assert page.read_text().startswith("<!doctype html>")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["data.jsonl", "page.html"]


class Elements(HTMLParser):
    """Tags and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.attributes = set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


def test_the_page_needs_no_other_file_and_runs_nothing(compared):
    _, _, page = compared
    found = Elements(page)
    assert not found.tags & {"script", "link", "img", "iframe", "a", "form"}
    assert not found.attributes & {"href", "src", "onload", "onerror", "style"}
    assert not re.search(r"url\(|@import|https?://", page)


EVIL = "<script>bad()</script>\"'><img src=x onerror=bad()>&lt;"


def test_texts_of_prompts_answers_and_folders_stay_text_on_the_page(tmp_path):
    lines = [
        {"id": EVIL, "group": EVIL, "prompt": EVIL, "expected": EVIL},
        {"prompt": EVIL, "expected": EVIL, "group": "other"},
    ]
    tasks, _ = read_tasks(data(tmp_path / "data.jsonl", *lines))
    found = [[Result(True, EVIL), Result(False, EVIL)], [Result(False, EVIL), Result(False, EVIL)]]
    labels = [EVIL, "other"]
    folders = [
        {"label": label, "precision": EVIL, "bytes": 1, "device": EVIL, "seconds": 1.0} for label in labels
    ]
    facts = {
        "data": EVIL,
        "sha256": "0" * 64,
        "lines": 2,
        "chat": True,
        "max_tokens": 4,
        "seed": 0,
        "date": "now",
    }
    page = html_page(Report(facts, folders, tasks, found, measures(tasks, labels, found, 0)))
    plain = Elements(page)
    assert not plain.tags & {"script", "img"}
    assert "onerror" not in plain.attributes
    assert page.count("&lt;script&gt;bad()") >= 10


def test_the_example_is_as_the_page_says():
    tasks, _ = read_tasks(REPOSITORY / "examples" / "evaluation" / "questions.jsonl")
    assert len(tasks) == 60
    assert {task.kind for task in tasks} == {"exact", "contains", "regex", "choice", "perplexity"}
