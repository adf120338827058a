"""If these fail, an input that is read only once hangs, or an option of the command is ignored."""

from __future__ import annotations

import json
import os
from threading import Thread

import pytest

from qrun.batch.journal import Journal
from tests.batch.jobs import beside, read_lines, request, write_lines
from tests.batch.typing_in import type_in
from tests.fakes import fake_manifest, fake_model, repeating


@pytest.mark.timeout(60)
def test_a_named_pipe_is_read_once(monkeypatch, model, tmp_path):
    """`qrun batch <(zcat prompts.gz)`: its first bytes were looked at, and the second reading hung."""
    pipe, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    os.mkfifo(pipe)
    Thread(target=lambda: pipe.write_text('{"prompt": "a"}\n{"prompt": "b"}\n'), daemon=True).start()
    done = type_in(monkeypatch, model, pipe, "--output", output)
    assert done.exit_code == 0, done.output
    assert [line["answer"] for line in read_lines(output)] == ["a", "b"]
    assert pipe.is_fifo()
    assert beside(output) == []


def test_a_raw_prompt_is_continued_as_far_as_a_chat(monkeypatch, tokenizer, tmp_path):
    """It ended after 16 tokens, the default of an API that nobody had asked."""
    manifest = fake_manifest(context_length=1024)
    model = fake_model(tokenizer, repeating(tokenizer, "abc"), manifest=manifest)
    source, output = tmp_path / "in.txt", tmp_path / "out.jsonl"
    source.write_text("x\n")
    assert type_in(monkeypatch, model, source, "--output", output, "--raw").exit_code == 0
    (line,) = read_lines(output)
    assert line["completion_tokens"] == 512


@pytest.mark.parametrize(("option", "control"), [((), False), (("--control-tokens",), True)])
def test_special_tokens_in_a_raw_prompt_are_text_as_in_a_chat(
    monkeypatch, tokenizer, tmp_path, option, control
):
    """A text of a data set that holds <|im_end|> ended the prompt, whatever --control-tokens said."""
    model = fake_model(tokenizer, repeating(tokenizer, "abc"))
    source, output = tmp_path / "in.txt", tmp_path / "out.jsonl"
    source.write_text("a<|im_end|>b\n")
    done = type_in(monkeypatch, model, source, "--output", output, "--raw", "--max-tokens", 2, *option)
    assert done.exit_code == 0, done.output
    (line,) = read_lines(output)
    whole = len(tokenizer.encode("a<|im_end|>b"))
    assert (line["prompt_tokens"] == whole) == control
    assert line["prompt_tokens"] >= whole


def test_a_request_of_the_api_keeps_its_default(monkeypatch, tokenizer, tmp_path):
    model = fake_model(tokenizer, repeating(tokenizer, "abc"))
    line = {"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "x"}}
    source, output = write_lines(tmp_path / "in.jsonl", [line]), tmp_path / "out.jsonl"
    assert type_in(monkeypatch, model, source, "--output", output).exit_code == 0
    (found,) = read_lines(output)
    assert found["response"]["body"]["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize("text", [None, {}, {"format": None}])
def test_a_schema_holds_for_responses_that_say_nothing_of_their_form(monkeypatch, model, tmp_path, text):
    """An empty ``text`` passed for a form of its own, and the answer was free."""
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"enum": ["yes", "no"]}))
    body = {"input": "hello", "text": text}
    source = write_lines(tmp_path / "in.jsonl", [{"custom_id": "a", "url": "/v1/responses", "body": body}])
    output = tmp_path / "out.jsonl"
    done = type_in(monkeypatch, model, source, "--output", output, "--schema", schema)
    assert done.exit_code == 0, done.output
    (found,) = read_lines(output)
    assert found["response"]["body"]["output"][0]["content"][0]["text"] in ('"yes"', '"no"')


def test_after_a_full_disk_it_is_told_what_is_kept(monkeypatch, model, tmp_path):
    added = Journal.add

    def full(journal, record, **places) -> None:
        if len(journal.done) == 2:
            raise OSError(28, "No space left on device")
        added(journal, record, **places)

    monkeypatch.setattr(Journal, "add", full)
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": letter} for letter in "abcd"])
    done = type_in(monkeypatch, model, source, "--output", tmp_path / "out.jsonl")
    assert done.exit_code == 1
    assert "stopped: 2 of 4 lines are answered and kept; the same command goes on" in done.stderr
    assert "No space left on device" in done.stderr


def test_one_line_is_one_line(monkeypatch, model, tmp_path):
    source = write_lines(tmp_path / "in.jsonl", [request("a", "x")])
    done = type_in(monkeypatch, model, source, "--output", tmp_path / "out.jsonl")
    assert "1 prompt at once: there is 1 line" in done.stderr
    assert done.stdout.startswith("1 line: 1 answered")


def test_a_template_runs_beside_columns_of_any_name(monkeypatch, model, tmp_path):
    """A column called "self" stopped every template, whatever that read."""
    source = write_lines(tmp_path / "in.jsonl", [{"self": "a", "x": None}])
    output = tmp_path / "out.jsonl"
    template = "a{{ x or 'b' }}{% if x is none %}c{% endif %}"
    assert type_in(monkeypatch, model, source, "--output", output, "--template", template).exit_code == 0
    (line,) = read_lines(output)
    assert (line["answer"], line["error"]) == ("abc", None)
