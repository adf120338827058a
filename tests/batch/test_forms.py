"""If these fail, a schema, an expression or a tool is asked for and not enforced."""

from __future__ import annotations

import json

import pytest

from tests.batch.jobs import read_lines, request, write_lines
from tests.batch.typing_in import type_in

SCHEMA = {
    "type": "object",
    "properties": {"good": {"type": "boolean"}},
    "required": ["good"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
MOST = 240  # tokens: a random model writes every blank that a schema allows


@pytest.fixture
def real(tiny_export):
    from qrun.model import Model

    return Model.open(tiny_export, threads=1)


def answered(monkeypatch, model, source, output, *options):
    done = type_in(
        monkeypatch, model, source, "--output", output, "--rows", 2, "--max-tokens", MOST, *options
    )
    assert done.exit_code == 0, done.output
    return read_lines(output)


def test_every_answer_fits_the_schema_in_whatever_form_it_was_asked(monkeypatch, real, tmp_path):
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    form = ("--schema", tmp_path / "schema.json")
    table = tmp_path / "t.csv"
    table.write_text("review\nfine\nbad\n")
    for row in answered(monkeypatch, real, table, tmp_path / "a.jsonl", *form):
        assert row["finish_reason"] == "stop"
        assert isinstance(json.loads(row["answer"])["good"], bool)

    own = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["mine"]}}}
    lines = [
        request("chat", "fine"),
        request("own", "fine", response_format=own),
        {"custom_id": "response", "url": "/v1/responses", "body": {"input": "fine"}},
    ]
    source = write_lines(tmp_path / "in.jsonl", lines)
    chat, mine, response = answered(monkeypatch, real, source, tmp_path / "b.jsonl", *form)
    text = chat["response"]["body"]["choices"][0]["message"]["content"]
    assert isinstance(json.loads(text)["good"], bool)
    assert mine["response"]["body"]["choices"][0]["message"]["content"] == '"mine"'
    text = response["response"]["body"]["output"][0]["content"][0]["text"]
    assert isinstance(json.loads(text)["good"], bool)


def test_an_expression_and_a_seed(monkeypatch, real, tmp_path):
    table = tmp_path / "t.txt"
    table.write_text("one\n" * 12)
    options = ("--regex", "[a-z]{3}", "--temperature", 1.5)
    first = answered(monkeypatch, real, table, tmp_path / "a.jsonl", *options)
    again = answered(monkeypatch, real, table, tmp_path / "b.jsonl", *options)
    other = answered(monkeypatch, real, table, tmp_path / "c.jsonl", *options, "--seed", 5)
    assert first == again != other
    assert len({row["answer"] for row in first}) > 6  # one prompt twelve times, sampled apart
    assert all(len(row["answer"]) == 3 for row in first)


def test_a_tool_that_must_be_called_stands_in_a_column(monkeypatch, real, tmp_path):
    (tmp_path / "tools.json").write_text(json.dumps([TOOL]))
    table = tmp_path / "t.txt"
    table.write_text("one\n")
    given = ("--tools", tmp_path / "tools.json", "--tool-choice")
    for choice in ("required", "look"):
        (row,) = answered(monkeypatch, real, table, tmp_path / f"{choice}.jsonl", *given, choice)
        (call,) = json.loads(row["tool_calls"])[:1]
        assert call["function"]["name"] == "look"
        assert row["finish_reason"] in ("tool_calls", "length")


BAD_OPTIONS = {
    "a keyword that is not enforced": (("--schema", "unique.json"), "uniqueItems"),
    "no expression": (("--regex", "(a"), "regex cannot be enforced"),
    "a tool that is not given": (("--tools", "tools.json", "--tool-choice", "hear"), "no tool 'hear'"),
    "a template without tools": (("--tools", "tools.json"), "no place for tools"),
    "a variable that is not read": (("--thinking",), "enable_thinking"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
@pytest.mark.parametrize("source", ["t.txt", "in.jsonl"])
def test_what_stands_against_every_line_is_refused_once(monkeypatch, real, tmp_path, name, source):
    """Ten thousand error records that all say the same are no answer."""
    options, words = BAD_OPTIONS[name]
    if source == "in.jsonl" and options[0] not in ("--schema", "--regex"):
        return  # another url may take it
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unique.json").write_text(json.dumps({"type": "array", "uniqueItems": True}))
    (tmp_path / "tools.json").write_text(json.dumps([TOOL]))
    (tmp_path / "t.txt").write_text("one\n")
    write_lines(tmp_path / "in.jsonl", [request("a", "x")])
    before = sorted(tmp_path.iterdir())
    done = type_in(monkeypatch, real, source, "--output", "out.jsonl", "--rows", 2, *options)
    assert done.exit_code == 1
    assert words in done.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_a_base_model_continues_text(monkeypatch, tokenizer, tmp_path):
    from tests.fakes import fake_manifest, fake_model, repeating

    base = fake_model(
        tokenizer, repeating(tokenizer, "ab"), manifest=fake_manifest(context_length=2048), template=None
    )
    table = tmp_path / "t.txt"
    table.write_text("one\n")
    (row,) = answered(monkeypatch, base, table, tmp_path / "a.jsonl")
    assert row["completion_tokens"] == MOST
