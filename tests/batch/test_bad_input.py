"""If these fail, a bad file or option ends in a traceback, in silence, or with something left behind."""

from __future__ import annotations

import gzip
import json
import os
import stat
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tests.batch.jobs import read_lines, request
from tests.batch.typing_in import type_in

GOOD = json.dumps(request("a", "hello")) + "\n"
TABLE = "id,text\n1,hello\n"
ARRAY = '[\n  {"prompt": "a"},\n  {"prompt": "b"}\n]\n'


def parquet(path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["hello"]}), path)


# What makes the input, what is typed, and words of the one message.
WHOLE = {
    "no such file": (None, "in.jsonl --output out.jsonl", "no such input"),
    "a folder": (lambda path: path.mkdir(), "in.jsonl --output out.jsonl", "the input is a folder"),
    "empty": ("", "in.jsonl --output out.jsonl", "the input is empty"),
    "blank lines only": ("\n \n\n", "in.jsonl --output out.jsonl", "the input is empty"),
    "packed": (
        lambda path: path.write_bytes(gzip.compress(GOOD.encode())),
        "in.jsonl --output out.jsonl",
        "packed",
    ),
    "UTF-16": (
        lambda path: path.write_text(GOOD, encoding="utf-16"),
        "in.jsonl --output out.jsonl",
        "zero bytes",
    ),
    "Parquet by another name": (parquet, "in.jsonl --output out.jsonl", "this is a Parquet file"),
    "no Parquet": (GOOD, "in.parquet --output out.jsonl", "no Parquet file"),
    "half a Parquet file": (
        lambda path: (parquet(path), os.truncate(path, 200)),
        "in.parquet --output out.jsonl",
        "no Parquet file",
    ),
    "no header": ("\n1,2\n", "in.csv --output out.csv", "no header"),
    "a name twice": ("a,a\n1,2\n", "in.csv --output out.csv", "two columns are called 'a'"),
    "a header only": ("id,prompt\n", "in.csv --output out.csv", "holds no line"),
    "a header with an open quote": ('"id,prompt\n', "in.csv --output out.csv", "header cannot be read"),
    "which column": (TABLE, "in.csv --output out.csv", "which column holds the prompt"),
    "no such column": (TABLE, "in.csv --column body --output out.csv", "no column 'body'"),
    "no such column of JSON": ('{"a": "x"}\n', "in.jsonl --column b --output out.csv", "no column 'b'"),
    "a template with no such column": (
        TABLE,
        "in.csv --template {{x}} --output out.csv",
        "there is no column 'x'",
    ),
    "no template": (TABLE, "in.csv --template {{x --output out.csv", "template cannot be read"),
    "no template file": (
        TABLE,
        "in.csv --template-file nowhere --output out.csv",
        "template cannot be read",
    ),
    "a header that is not UTF-8": (
        lambda path: path.write_bytes("id,caf\u00e9\n1,x\n".encode("latin-1")),
        "in.csv --column id --output out.jsonl",
        "the header is not UTF-8",
    ),
    # Its whole lines were taken for prompts.
    "a header with semicolons": ("id;text\n1;x\n", "in.csv --output out.csv", "separated otherwise"),
    "a header with tabs": ("id\ttext\n1\tx\n", "in.csv --output out.csv", "name the file .tsv"),
    "a column without a name": (TABLE, ["in.csv", "--column", "", "--output", "out.csv"], "no column ''"),
    "an empty template": (TABLE, ["in.csv", "--template", "", "--output", "out.csv"], "template is empty"),
    "an array of JSON": (ARRAY, "in.json --output out.jsonl", "this is one JSON array"),
    "an array by another name": (ARRAY, "in.jsonl --output out.jsonl", "this is one JSON array"),
    "an array of texts": ('["a", "b"]\n', "in.json --output out.jsonl", "this is one JSON array"),
    "one object over several lines": ('{\n "prompt": "x"\n}\n', "in.json --output o.jsonl", "no row of the"),
    "a column of Parquet twice": (
        lambda path: pyarrow.parquet.write_table(pyarrow.table([["a"], ["b"]], names=["x", "x"]), path),
        "in.parquet --column x --output out.jsonl",
        "two columns are called 'x'",
    ),
    "a device": (None, "/dev/zero --output out.jsonl", "the input is no file"),
    # It was found after the last answer, and the answers could not be published.
    "an output that is a link to nowhere": (GOOD, "in.jsonl --output dangling.jsonl", "a link to nowhere"),
    "types that exclude each other": (
        '{"prompt": "a", "x": 1}\n{"prompt": "b", "x": "c"}\n',
        "in.jsonl --output out.parquet",
        "cannot hold these values: column 'x'",
    ),
    "a number beyond 64 bits": (
        '{"prompt": "a", "x": 18446744073709551616}\n',
        "in.jsonl --output out.parquet",
        "cannot hold these values: column 'x'",
    ),
    "an empty object": ('{"prompt": "a", "x": {}}\n', "in.jsonl --output out.parquet", "cannot hold these"),
    "an answer's column": ("answer\nx\n", "in.csv --output out.csv", "column 'answer'"),
    "an output without a format": (GOOD, "in.jsonl --output out", "does not say its format"),
    "batch lines into CSV": (GOOD, "in.jsonl --output out.csv", "answered in JSON lines"),
    "no folder for the output": (GOOD, "in.jsonl --output nowhere/out.jsonl", "no such folder"),
    "the output is a folder": (GOOD, "in.jsonl --output folder", "the output is a folder"),
    "the output is a pipe": (GOOD, "in.jsonl --output fifo", "the output is no file"),
    "the output is the input": (GOOD, "in.jsonl --output in.jsonl", "the output is the input"),
    "the output exists": (GOOD, "in.jsonl --output there.jsonl", "exists already"),
    "Parquet cannot grow": (TABLE, "in.csv --column text --unordered --output o.parquet", "cannot grow"),
    "no schema file": (GOOD, "in.jsonl --schema nowhere --output out.jsonl", "the schema cannot be read"),
    "no schema": (GOOD, "in.jsonl --schema in.csv --output out.jsonl", "the schema is not JSON"),
    "no tools": (GOOD, "in.jsonl --tools folder/object --output out.jsonl", "must hold a list of tools"),
    "a system message for batch lines": (GOOD, "in.jsonl --system x --output out.jsonl", "--system has no"),
    "a prefix for batch lines": (GOOD, "in.jsonl --prefix x --output out.jsonl", "--prefix has no"),
    "a folder of somebody else's": (GOOD, "in.jsonl --output foreign.jsonl", "not ours"),
    "a job of somebody else's": (GOOD, "in.jsonl --output strange.jsonl", "this is no job"),
    "a file where the job's folder goes": (GOOD, "in.jsonl --output blocked.jsonl", "a folder is needed"),
}


def lay_out(place: Path, content, name: str) -> None:
    """What lies in the folder before: inputs, and what is in the way."""
    (place / "folder").mkdir()
    (place / "folder" / "object").write_text("{}")
    (place / "there.jsonl").write_text("mine")
    os.mkfifo(place / "fifo")
    (place / "dangling.jsonl").symlink_to(place / "away" / "out.jsonl")
    for job, file in (("foreign", "thesis.txt"), ("strange", "job.json")):
        (place / f"{job}.jsonl.qrun-batch").mkdir()
        (place / f"{job}.jsonl.qrun-batch" / file).write_text("mine")
    (place / "blocked.jsonl.qrun-batch").write_text("mine")
    (place / "in.csv").write_text(TABLE)
    path = place / name
    if callable(content):
        content(path)
    elif content is not None:
        path.write_text(content)


def seen(place: Path) -> dict[str, bytes | None]:
    """Every file with its content."""
    return {
        str(path.relative_to(place)): path.read_bytes() if stat.S_ISREG(path.lstat().st_mode) else None
        for path in sorted(place.rglob("*"))
    }


@pytest.mark.parametrize("name", WHOLE)
def test_what_cannot_be_done_is_one_message_and_leaves_nothing(name, monkeypatch, model, tmp_path):
    content, typed, words = WHOLE[name]
    typed = typed.split() if isinstance(typed, str) else typed
    monkeypatch.chdir(tmp_path)
    lay_out(tmp_path, content, typed[0])
    before = seen(tmp_path)
    done = type_in(monkeypatch, model, *typed)
    assert done.exit_code == 1, done.output
    assert done.stdout == ""
    assert words in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr
    assert seen(tmp_path) == before


USAGE = {
    "in.csv": "--output",
    "in.csv --output o.csv --rows 0": "neither auto nor a number",
    "in.csv --output o.csv --rows many": "neither auto nor a number",
    "in.csv --output o.csv --max-errors -1": "--max-errors",
    "in.csv --output o.csv --temperature -1": "--temperature",
    "in.csv --output o.csv --column a --template b": "either --column or --template",
    "in.csv --output o.csv --template a --template-file b": "either --template or --template-file",
    "in.csv --output o.csv --schema a --regex b": "either --schema or --regex",
    "in.csv --output o.csv --tools a --regex b": "either --tools or --regex",
    "in.csv --output o.csv --tool-choice auto": "--tool-choice needs --tools",
    "in.csv --output o.csv --raw --system a": "--system has no place",
    "in.csv --output o.csv --raw --thinking": "--thinking has no place",
    "in.csv --output o.csv --raw --tools a": "--tools has no place",
    "in.csv --output o.csv --format xml": "--format",
}


@pytest.mark.parametrize("typed", USAGE)
def test_a_wrong_command_line_is_told(typed, monkeypatch, model, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.csv").write_text(TABLE)
    done = type_in(monkeypatch, model, *typed.split())
    assert done.exit_code == 2
    assert USAGE[typed] in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in.csv"]


DEEP = '{"custom_id": "x", "url": "/v1/completions", "body": ' + '{"a":' * 5000 + "1" + "}" * 5001
# Lines between two good ones, and the kind and words of the record that they get.
LINES = {
    "no JSON": ("{half", "invalid_json", "is not JSON"),
    "no object": ("[1, 2]", "invalid_json", "no JSON object"),
    "no UTF-8": (b'{"custom_id": "\xff"}', "invalid_json", "is not JSON"),
    "too deep": (DEEP, "invalid_json", "not JSON"),
    "no custom_id": ({**request("b", "x"), "custom_id": None}, "invalid_line", "custom_id must be a text"),
    "custom_id is missing": ({"url": "/v1/completions", "body": {}}, "invalid_line", "custom_id is missing"),
    "custom_id twice": (request("a", "x"), "duplicate_custom_id", "in an earlier line"),
    "url is missing": ({"custom_id": "b", "body": {}}, "invalid_line", "url is missing"),
    "url is no text": ({**request("b", "x"), "url": 1}, "invalid_line", "url must be a text"),
    "body is no object": ({**request("b", "x"), "body": []}, "invalid_line", "body must be an object"),
    "GET": ({**request("b", "x"), "method": "GET"}, "invalid_line", "method must be POST"),
    "a field of the line": (
        {**request("b", "x"), "priority": 1},
        "invalid_line",
        "priority is not supported",
    ),
    "another url": ({**request("b", "x"), "url": "/v1/embeddings"}, "not_found", "/v1/embeddings"),
    "no messages": ({**request("b", "x"), "body": {}}, "invalid_request", "messages is missing"),
    "a field of the body": (request("b", "x", speed=2), "invalid_request", "speed is not supported"),
    "a wrong type": (request("b", "x", temperature="hot"), "invalid_request", "temperature"),
    "out of range": (request("b", "x", top_p=2), "invalid_request", "top_p"),
    "a stream": (request("b", "x", stream=True), "invalid_request", "stream has no place"),
    "an image": (request("b", [{"type": "image_url"}]), "invalid_request", "reads text only"),
    "a role": ({**request("b", "x"), "body": {"messages": [{"role": "king"}]}}, "invalid_request", "role"),
    "too long": (request("b", "long " * 600), "context_length_exceeded", "the model's context is 2,048"),
    "a schema": (
        request("b", "x", response_format={"type": "xml"}),
        "invalid_request",
        "response_format.type",
    ),
    "too many answers": (request("b", "x", n=99), "invalid_request", "n must be"),
}


@pytest.mark.parametrize("name", LINES)
def test_a_bad_line_is_an_error_record_and_its_neighbours_are_answered(name, monkeypatch, model, tmp_path):
    line, kind, words = LINES[name]
    raw = line if isinstance(line, bytes) else line.encode() if isinstance(line, str) else None
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    middle = raw if raw is not None else json.dumps(line).encode()
    source.write_bytes(GOOD.encode() + middle + b"\n" + json.dumps(request("c", "bye")).encode() + b"\n")
    done = type_in(monkeypatch, model, source, "--output", output, "--json", "--rows", 2)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["errors"] == {kind: 1}
    first, bad, last = read_lines(output)
    for good, text in ((first, "hello"), (last, "bye")):
        assert good["response"]["body"]["choices"][0]["message"]["content"] == text
    told = bad["error"] or bad["response"]["body"]["error"]
    assert words in told["message"]
    assert (bad["response"] is None) == (bad["error"] is not None)


ROWS = {
    "a missing column": ('{"text": "a"}\n{"other": 1}\n', "in.jsonl --column text", "no column 'text'"),
    "no text": ('{"text": "a"}\n{"text": 5}\n', "in.jsonl --column text", "holds int, not a text"),
    "nothing": ('{"text": "a"}\n{"text": null}\n', "in.jsonl --column text", "not a text"),
    "empty": ("id,text\n1,a\n2,\n", "in.csv --column text", "the prompt is empty"),
    "too few fields": ("id,text\n1,a\n2\n", "in.csv --column text", "has 1 fields and the header 2"),
    "too many fields": ("id,text\n1,a\n2,b,c\n", "in.csv --column text", "has 3 fields"),
    "an open quote": ('id,text\n1,a\n2,"b\n', "in.csv --column text", "is no row of CSV"),
    "no UTF-8 in CSV": (b"id,text\n1,a\n2,\xff\n", "in.csv --column text", "is not UTF-8"),
    "no UTF-8 in text": (b"a\n\xff\n", "in.txt", "is not UTF-8"),
    "a blank line of text": ("a\n\n", "in.txt", "the prompt is empty"),
    "a template that fails": (
        '{"x": "1"}\n{"x": null}\n',
        "in.jsonl --template {{x|int(base=x)}}{{1/x|int}}",
        "the template fails",
    ),
    # The model was asked about the word None.
    "a template that prints nothing": (
        '{"x": "a"}\n{"x": null}\n',
        "in.jsonl --template {{x}}",
        "it prints a value that is null",
    ),
    "a template that breaks out": (
        '{"x": ""}\n{"x": "a"}\n',
        "in.jsonl --template {{'a'if(not(x))else(x.__class__.mro())}}",
        "the template fails",
    ),
    "messages of no role": ('{"m": "a"}\n{"m": [{"content": "x"}]}\n', "in.jsonl --column m", "role"),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_bad_row_has_its_error_beside_it(name, monkeypatch, model, tmp_path):
    content, typed, words = ROWS[name]
    monkeypatch.chdir(tmp_path)
    file, *options = typed.split()
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    done = type_in(monkeypatch, model, file, *options, "--output", "out.jsonl", "--rows", 2)
    assert done.exit_code == 0, done.output
    good, bad = read_lines(tmp_path / "out.jsonl")
    assert good["error"] is None
    assert good["answer"] == "a" or name == "a template that fails"
    assert words in bad["error"]
    assert bad["answer"] is None


def test_parquet_says_what_to_install(monkeypatch, model, tmp_path):
    monkeypatch.setattr("qrun.batch.parquet.find_spec", lambda name: None)
    (tmp_path / "in.txt").write_text("x\n")
    parquet(tmp_path / "in.parquet")
    for source, output in (("in.parquet", "out.jsonl"), ("in.txt", "out.parquet")):
        done = type_in(monkeypatch, model, tmp_path / source, "--output", tmp_path / output)
        assert done.exit_code == 1
        assert "pip install 'qconvert[batch]'" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.parquet", "in.txt"]
