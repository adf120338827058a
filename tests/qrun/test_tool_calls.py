"""If these fail, a call of a tool is lost, or text is taken for one."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrun.text.tool_calls import ToolCall, ToolCallParser

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
F = ToolCall("f", '{"a": 1}')
TAGS_WITHIN = '<tool_call>\n{"name": "f", "arguments": {"a": "</tool_call><tool_call>"}}\n</tool_call>'

CASES = {
    "no call": ("Hello there.\n", ["Hello there.\n"]),
    "one": (CALL, [F]),
    "text before it": (f"Let me look.\n\n{CALL}", ["Let me look.", F]),
    "text behind it": (f"{CALL}\nDone. ", [F, "Done. "]),
    "text between": (f"a\n{CALL}\nb\n{CALL}", ["a", F, "b", F]),
    "several": (f"{CALL}\n{CALL}\n", [F, F]),
    "plain JSON": ('{"name": "f", "arguments": {"a": 1}}', ['{"name": "f", "arguments": {"a": 1}}']),
    "no JSON": ("<tool_call>\nhm\n</tool_call>", ["<tool_call>\nhm\n</tool_call>"]),
    "cut-off": ('<tool_call>\n{"name": "f", "arg', ['<tool_call>\n{"name": "f", "arg']),
    "without its end": ('<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n', [F]),
    "no such tool": (CALL.replace('"f"', '"g"'), [CALL.replace('"f"', '"g"')]),
    "a list": ("<tool_call>[1]</tool_call>", ["<tool_call>[1]</tool_call>"]),
    "arguments are a list": (CALL.replace('{"a": 1}', "[1]"), [CALL.replace('{"a": 1}', "[1]")]),
    "arguments as text": (CALL.replace('{"a": 1}', json.dumps('{"a": 1}')), [F]),
    "no arguments": ('<tool_call>{"name": "f"}</tool_call>', [ToolCall("f", "{}")]),
    "tags within a text": (TAGS_WITHIN, [ToolCall("f", '{"a": "</tool_call><tool_call>"}')]),
    "half a tag": ("a < b <tool_cal", ["a < b <tool_cal"]),
    "other scripts": (CALL.replace("1", '"é水"'), [ToolCall("f", '{"a": "é水"}')]),
    "blanks before what is no call": ("a \n<tool_call>x</tool_call> b", ["a \n<tool_call>x</tool_call> b"]),
    "blanks before a call": (" \n" + CALL, [F]),
    "blanks": ("  \n ", ["  \n "]),
    "only thought of": (
        f"<think>\nI could {CALL}\n</think>\n\n{CALL}",
        [f"<think>\nI could {CALL}\n</think>", F],
    ),
    "a thought without its end": (f" <think>{CALL}", [f" <think>{CALL}"]),
    "a thought behind text": (f"x <think>{CALL}</think>", ["x <think>", F, "</think>"]),
    "half of a thought's tag": (" <thi", [" <thi"]),
    "no thought": (f"<thing> {CALL}", ["<thing>", F]),
    # Each ended the request, or the whole batch, with a traceback, or was JSON that no client can read.
    "a name that is a list": (CALL.replace('"f"', '["f"]'), [CALL.replace('"f"', '["f"]')]),
    "a name that is an object": (CALL.replace('"f"', "{}"), [CALL.replace('"f"', "{}")]),
    "not a number": (CALL.replace("1", "NaN"), [CALL.replace("1", "NaN")]),
    "beyond all numbers": (CALL.replace("1", "1e999"), [CALL.replace("1", "1e999")]),
    "half a character": (CALL.replace("1", '"\\ud83d é"'), [ToolCall("f", '{"a": "\\ud83d \\u00e9"}')]),
    "a deep nest": (f"<tool_call>{'[' * 100_000}</tool_call>!", [f"<tool_call>{'[' * 100_000}</tool_call>!"]),
}


def read(pieces: list[str], **options: bool) -> list[str | ToolCall]:
    parser = ToolCallParser(["f"], **options)
    found = [each for piece in pieces for each in parser.push(piece)] + parser.flush()
    assert "" not in found
    joined: list[str | ToolCall] = []
    for each in found:
        if isinstance(each, str) and joined and isinstance(joined[-1], str):
            joined[-1] += each
        else:
            joined.append(each)
    return joined


@pytest.mark.parametrize("name", CASES)
def test_calls_and_text_are_told_apart(name):
    text, expected = CASES[name]
    assert read([text]) == expected
    if len(text) < 1000:
        assert read(list(text)) == expected


PARTS = ["a", " ", "\n", CALL, TAGS_WITHIN, "<tool_call>", "</tool_call>", "{}", "<to", '"']
PARTS += ["<think>", "</think>", "<th", "</th"]


@given(st.lists(st.sampled_from(PARTS)), st.data())
def test_the_result_does_not_depend_on_how_the_text_was_cut(parts, data):
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)))))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)])]
    assert read(pieces) == read([text]) == read(list(text))


def test_a_thought_that_the_prompt_has_opened_is_one():
    """DeepSeek-R1's template ends in <think>: a call in the thought was read as one."""
    assert read([f"perhaps {CALL}?\n</think>\n{CALL}"], in_thought=True) == [f"perhaps {CALL}?\n</think>", F]
    parser = ToolCallParser(["f"], in_thought=True)
    assert parser.push("I </th") == ["I "]
    assert parser.push("ink> <tool_call>") == ["</think>"]


def test_text_comes_as_soon_as_it_can_be_no_call():
    parser = ToolCallParser(["f"])
    assert parser.push("Hello <") == ["Hello"]
    assert parser.push("b> x") == [" <b> x"]
    assert parser.push("\n<tool_call>") == []
    assert parser.push('{"name": "f"}</tool_call>') == [ToolCall("f", "{}")]


def test_one_call_where_several_are_not_wanted():
    assert read([f"a\n{CALL}\n{CALL} b"], parallel=False) == ["a", F]
