"""If these fail, whoever sets a default or mends a template in an export is told that it is damaged."""

from __future__ import annotations

import json
import os

import pytest

import qrun as api
from qrun.errors import QrunError
from tests.commands import qrun, refused

ASK = ("--prompt", "hi", "--max-tokens", 2)


def edit_json(path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values, indent=1))


EDITS = {
    "generation_config.json": lambda path: edit_json(path, temperature=0.3),
    "genai_config.json": lambda path: path.write_text(path.read_text() + "\n"),
    "tokenizer_config.json": lambda path: edit_json(path, chat_template="{{ messages[0]['content'] }}!"),
    "config.json": lambda path: edit_json(path, note="mine"),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_text_is_a_note_and_no_refusal(name, broken):
    EDITS[name](broken / name)
    done = qrun("generate", "--engine", broken, "--check-hashes", *ASK)
    assert (done.exit_code, done.stderr) == (0, f"edited since the export: {name}\n")
    told = qrun("info", broken, "--check-hashes").stdout
    assert [line for line in told.splitlines() if f"{name}, edited since the export" in line]
    files = json.loads(qrun("info", broken, "--json").stdout)["files"]
    assert [entry["path"] for entry in files if entry["edited"]] == [name]


def test_an_edit_of_the_same_length_is_seen(broken):
    path = broken / "generation_config.json"
    path.write_text(path.read_text().replace("0.7", "0.5"))
    assert api.open(broken).manifest.edited_files() == ("generation_config.json",)
    assert api.open(broken).resolve({})[0].temperature == 0.5


def test_a_folder_as_it_was_written_is_silent(tiny_export):
    assert qrun("generate", "--engine", tiny_export, *ASK).stderr == ""


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"top_p": 1.5}, "top_p must be a number from 0 to 1 (off), not 1.5"),
        ({"temperature": "hot"}, "temperature must be"),
        ({"eos_token_id": "end"}, "eos_token_id must be"),
    ],
)
def test_an_edited_default_is_judged_when_the_folder_is_opened(values, says, broken):
    edit_json(broken / "generation_config.json", **values)
    with pytest.raises(QrunError) as caught:
        api.open(broken)
    assert says in str(caught.value)
    assert caught.value.where == "generation_config.json"
    assert says in refused(qrun("chat", "--engine", broken, stdin="hi\n"))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("generation_config.json", "{", "generation_config.json is not JSON"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json must hold a JSON object"),
        (
            "tokenizer_config.json",
            '{"chat_template": "{% for"}',
            "syntax is wrong in line 1",
        ),
    ],
)
def test_an_edit_that_breaks_a_file_is_told_by_what_is_wrong_with_it(name, content, says, broken):
    (broken / name).write_text(content)
    with pytest.raises(QrunError, match=says):
        api.open(broken)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "tokenizer.json"])
def test_graph_weights_and_vocabulary_stay_strict(name, broken):
    content = bytearray((broken / name).read_bytes())
    content[-1] ^= 1
    (broken / name).write_bytes(bytes(content))
    assert f"{name} is altered" in refused(qrun("generate", "--engine", broken, "--check-hashes", *ASK))
    os.truncate(broken / name, len(content) - 1)
    assert f"{name} is truncated" in refused(qrun("generate", "--engine", broken, *ASK))


def test_a_missing_text_is_still_missing(broken):
    # Without its template a chat model would continue text, and say nothing.
    (broken / "generation_config.json").unlink()
    assert "generation_config.json is missing" in refused(qrun("info", broken))
