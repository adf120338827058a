"""If these fail, a slip in the data is judged as an answer, or ends in a traceback."""

from __future__ import annotations

import json

import pytest

from qrun.errors import QrunError
from qrun.evaluation.tasks import read_tasks
from tests.commands import qrun, refused
from tests.evaluation.writing import TASK, data

USER = {"role": "user", "content": "Hello"}
BAD_LINES = {
    "not JSON": ('{"prompt": "x"', "line 2 is not JSON"),
    "not UTF-8": (b'{"prompt": "\xff", "expected": "y"}', "line 2 is not JSON"),
    "not an object": ("[1, 2]", "line 2 is no JSON object"),
    "an unknown field": (
        {**TASK, "expect": "Rome"},
        "'expect' is no field of a line (did you mean expected?)",
    ),
    "a strange field": ({**TASK, "zzz": 1}, "known are id, group"),
    "no prompt": ({"expected": "Rome"}, "line 2: prompt is missing"),
    "prompt and messages": ({**TASK, "messages": [USER]}, "prompt and messages exclude each other"),
    "a prompt that is no text": ({**TASK, "prompt": 5}, "prompt must be a text, not int"),
    "an empty prompt": ({**TASK, "prompt": "  "}, "prompt is empty"),
    "an empty system message": ({**TASK, "system": ""}, "system is empty"),
    "messages that are none": ({"messages": "Hello", "expected": "x"}, "messages must be a list"),
    "no messages": ({"messages": [], "expected": "x"}, "messages must be a list"),
    "a message without a role": (
        {"messages": [{"content": "x"}], "expected": "x"},
        "messages must be a list",
    ),
    "an answered conversation": (
        {"messages": [USER, {"role": "assistant", "content": "x"}], "expected": "x"},
        "there is nothing to answer",
    ),
    # Templates leave such a message out, and the model was never asked.
    "a role that nobody has": (
        {"messages": [{"role": "human", "content": "x"}], "expected": "x"},
        "the role 'human' in messages is none of",
    ),
    "more of a message": (
        {"messages": [{**USER, "prefix": True}], "expected": "x"},
        "'prefix' in messages is not read",
    ),
    "nothing expected": ({"prompt": "x"}, "expected is missing"),
    "an empty expectation": ({**TASK, "expected": ""}, "expected is empty"),
    "an empty list of expectations": ({**TASK, "expected": []}, "nothing would be right"),
    "a fraction": ({**TASK, "expected": 0.5}, "not float"),
    "true": ({**TASK, "expected": True}, "not bool"),
    "an unknown match": ({**TASK, "match": "fuzzy"}, "match is 'fuzzy', not one of exact, contains, regex"),
    "a broken expression": ({**TASK, "match": "regex", "expected": "("}, "is no regular expression"),
    "one choice": ({**TASK, "choices": ["Rome"]}, "two or more"),
    "choices that are no list": ({**TASK, "choices": "Rome"}, "two or more"),
    "a choice twice": ({**TASK, "choices": ["Rome", "Rome"]}, "the choice 'Rome' stands twice"),
    "an empty choice": ({**TASK, "choices": ["Rome", ""]}, "a choice is empty"),
    "a right choice that is none": ({**TASK, "choices": ["Oslo", "Bern"]}, "'Rome' is none of the 2 choices"),
    "a place outside": ({"prompt": "x", "choices": ["a", "b"], "expected": 2}, "2 is none of the 2 choices"),
    "several right choices": (
        {"prompt": "x", "choices": ["a", "b"], "expected": ["a"]},
        "one of the choices",
    ),
    "match beside choices": ({**TASK, "choices": ["Rome", "Oslo"], "match": "exact"}, "beside choices"),
    "a text with a prompt": ({**TASK, "text": "x"}, "prompt, expected has no place beside text"),
    "an empty text": ({"text": ""}, "text is empty"),
    "a group that is no text": ({**TASK, "group": 3}, "group must be a text"),
    "an id that is a list": ({**TASK, "id": []}, "id must be a text or a whole number"),
    "an id twice": ({**TASK, "id": "first"}, "id 'first' is that of line 1 too"),
}


@pytest.mark.parametrize(("line", "words"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_line_that_cannot_be_used_is_refused_by_its_number(tmp_path, line, words):
    path = data(tmp_path / "data.jsonl", {**TASK, "id": "first"}, line)
    with pytest.raises(QrunError) as refusal:
        read_tasks(path)
    assert words in refusal.value.what
    assert "line 2" in refusal.value.what
    assert refusal.value.where == str(path)


def test_many_bad_lines_are_counted_in_one_message(tmp_path):
    with pytest.raises(QrunError, match=r"line 5: .*; and 7 more lines") as refusal:
        read_tasks(data(tmp_path / "data.jsonl", *[{"prompt": "x"}] * 12))
    assert refusal.value.what.count("expected is missing") == 5


def test_blank_lines_and_a_byte_order_mark_are_no_faults(tmp_path):
    line = json.dumps(TASK).encode()
    found, _ = read_tasks(data(tmp_path / "data.jsonl", b"\xef\xbb\xbf" + line, "", line))
    assert [(task.number, task.name) for task in found] == [(1, "line 1"), (3, "line 3")]


@pytest.mark.parametrize("expected", [4, "4"])
def test_a_whole_number_stands_for_its_digits_and_a_choice_may_be_named_by_its_place(tmp_path, expected):
    lines = [{"prompt": "x", "expected": expected}, {"prompt": "x", "choices": [3, 4], "expected": expected}]
    (number, choice), _ = read_tasks(data(tmp_path / "a.jsonl", *lines))
    assert (number.expected, choice.expected, choice.choices) == (("4",), ("4",), ("3", "4"))
    ((placed,), _) = read_tasks(
        data(tmp_path / "b.jsonl", {"prompt": "x", "choices": ["a", "b"], "expected": 1})
    )
    assert placed.expected == ("b",)


COMMANDS = {
    "a file that is not there": (["none.jsonl"], "there is no such file"),
    "a folder": (["."], "this is a folder"),
    "an empty file": (["empty.jsonl"], "the file has no lines"),
    "a model that is none": (["data.jsonl", "--engine", "data.jsonl"], "data.jsonl"),
    "another that is none": (["data.jsonl", "--against", "nowhere"], "nowhere"),
    "the same folder": (["data.jsonl", "--against", "model"], "this folder stands twice"),
    "its graph": (["data.jsonl", "--against", "model/model.onnx"], "this folder stands twice"),
    "a page that is there": (["data.jsonl", "--page", "data.jsonl"], "the file exists already"),
    "a page that is a folder": (["data.jsonl", "--page", "model", "--force"], "names a folder"),
    "a page in no folder": (["data.jsonl", "--page", "no/page.html"], "no such folder"),
    "a long line": (["long.jsonl"], "line 1 (line 1) cannot be asked"),
    "a conversation as text": (["chat.jsonl", "--raw"], "it is a conversation"),
    "an unknown template": (["data.jsonl", "--chat-template", "zzz"], "zzz"),
    "thinking that the template does not know": (["data.jsonl", "--thinking"], "enable_thinking"),
}
USAGES = (
    ["--max-tokens", "0"],
    ["--match", "fuzzy"],
    ["--rows", "0"],
    ["--raw", "--system", "x"],
    ["--raw", "--no-thinking"],
    ["--seed", "-1"],
)


@pytest.fixture
def here(tmp_path, tiny_export, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data(tmp_path / "data.jsonl", TASK)
    data(tmp_path / "long.jsonl", {**TASK, "prompt": "x" * 2000})
    data(tmp_path / "chat.jsonl", {"messages": [USER], "expected": "x"})
    data(tmp_path / "empty.jsonl", "")
    (tmp_path / "model").symlink_to(tiny_export)
    return tmp_path


@pytest.mark.parametrize(("arguments", "words"), COMMANDS.values(), ids=COMMANDS.keys())
def test_a_wrong_command_is_one_message_and_leaves_nothing(here, arguments, words):
    before = {path: path.stat().st_mtime_ns for path in here.iterdir()}
    engine = [] if "--engine" in arguments else ["--engine", "model"]
    message = refused(qrun("eval", *engine, *arguments, "--threads", 1, "--max-tokens", 4))
    assert words in message
    assert message.count("error:") == 1
    assert {path: path.stat().st_mtime_ns for path in here.iterdir()} == before


@pytest.mark.parametrize("arguments", USAGES, ids=" ".join)
def test_a_wrong_option_is_a_wrong_command_line(here, arguments):
    refused(qrun("eval", "--engine", "model", "data.jsonl", *arguments), code=2)
