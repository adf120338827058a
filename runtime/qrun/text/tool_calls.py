"""Calls of tools in an answer's text, in the format that Qwen's chat templates ask for.

<tool_call>
{"name": "get_weather", "arguments": {"city": "Paris"}}
</tool_call>
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

OPENING, CLOSING = "<tool_call>", "</tool_call>"
THOUGHT, THOUGHT_END = "<think>", "</think>"


class _Thought(Enum):
    MAY_BEGIN = "only blanks so far"
    OPEN = "within it"
    PAST = "behind it, or there was none"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call, whole.

    Attributes:
        name: of the tool.
        arguments: a JSON object, as text.
    """

    name: str
    arguments: str


class ToolCallParser:
    """Separates calls from text while it arrives; the result does not depend on how the text was cut.

    Text before, between and after calls is kept, without the blanks around a call. Only a call of a known
    tool within the tags is a call: JSON elsewhere is text, and so is anything else within the tags.
    A thought at the beginning of an answer is text as a whole, whatever calls the model thinks of in it.

    Args:
        names: of the tools that there are.
        parallel: False takes the first call, and drops what comes after it.
        in_thought: whether the prompt has opened a thought already, as some chat templates do.
    """

    def __init__(self, names: Collection[str], *, parallel: bool = True, in_thought: bool = False) -> None:
        self._thought = _Thought.OPEN if in_thought else _Thought.MAY_BEGIN
        self._names = frozenset(names)
        self._parallel = parallel
        self._held = ""  # outside of tags: what may become one, and blanks before it; inside: all since it
        self._inside = False
        self._blanks = ""  # before the opening tag; they are text if no call follows
        self._behind_call = False  # whether a call came last, and no text since
        self._called = False

    def push(self, text: str) -> list[str | ToolCall]:
        """The pieces of text, none of them empty, and the calls that are certain now with more text."""
        self._held += text
        found: list[str | ToolCall] = []
        while self._step(found):
            pass
        return self._kept(found)

    def flush(self) -> list[str | ToolCall]:
        """What was held back, now that no text comes any more; a call may lack its closing tag."""
        rest, self._held = self._held, ""
        found: list[str | ToolCall] = [self._call(rest) or self._no_call(rest)] if self._inside else [rest]
        self._inside = False
        return self._kept(found)

    def _step(self, found: list[str | ToolCall]) -> bool:
        """Take one tag, if there is one; returns whether there may be another."""
        if self._thought is not _Thought.PAST:
            return self._step_thought(found)
        if self._inside:
            return self._step_inside(found)
        if self._behind_call:
            self._held = self._held.lstrip()
        before, tag, behind = self._held.partition(OPENING)
        sure = len(before.rstrip()) if tag else len(before) - _held_back(before)
        if before[:sure]:
            found.append(before[:sure])
            self._behind_call = False
        if tag:
            self._inside, self._blanks, self._held = True, before[sure:], behind
        else:
            self._held = before[sure:]
        return bool(tag)

    def _step_thought(self, found: list[str | ToolCall]) -> bool:
        if self._thought is _Thought.MAY_BEGIN:
            begun = self._held.lstrip()
            if len(begun) < len(THOUGHT) and THOUGHT.startswith(begun):
                return False
            self._thought = _Thought.OPEN if begun.startswith(THOUGHT) else _Thought.PAST
            return True
        before, tag, behind = self._held.partition(THOUGHT_END)
        sure = len(before) if tag else len(before) - _beginning_at_the_end(before, THOUGHT_END)
        found.append(before[:sure] + tag)
        self._held = behind if tag else before[sure:]
        if tag:
            self._thought = _Thought.PAST
        return bool(tag)

    def _step_inside(self, found: list[str | ToolCall]) -> bool:
        before, tag, behind = self._held.partition(CLOSING)
        while tag:
            call = self._call(before)
            if call is not None or not _within_string(before):
                found.append(call or self._no_call(before + CLOSING))
                self._inside, self._held, self._behind_call = False, behind, call is not None
                return True
            # The tag stands in a text among the arguments.
            more, tag, behind = behind.partition(CLOSING)
            before += CLOSING + more
        return False

    def _no_call(self, text: str) -> str:
        return self._blanks + OPENING + text

    def _kept(self, found: list[str | ToolCall]) -> list[str | ToolCall]:
        kept: list[str | ToolCall] = []
        for each in found:
            if not each or (self._called and not self._parallel):
                continue
            self._called = self._called or isinstance(each, ToolCall)
            kept.append(each)
        return kept

    def _call(self, text: str) -> ToolCall | None:
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            return None
        name = content.get("name") if isinstance(content, dict) else None
        if not isinstance(name, str) or name not in self._names:
            return None
        arguments = content.get("arguments", {})
        if isinstance(arguments, str):  # some models write them as a text that holds JSON
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                return None
        written = _as_json(arguments) if isinstance(arguments, dict) else None
        return None if written is None else ToolCall(name, written)


def _as_json(arguments: Mapping[str, Any]) -> str | None:
    """As JSON that everybody reads; None where there is none: Python takes NaN and 1e999 for numbers."""
    try:
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return None
    try:
        text.encode()
    except UnicodeEncodeError:  # half a character stays as it was written, as an escape
        return json.dumps(arguments)
    return text


def _held_back(text: str) -> int:
    """Length of the end of a text that is blanks, the beginning of a tag, or both."""
    partial = _beginning_at_the_end(text, OPENING)
    return len(text) - len(text[: len(text) - partial].rstrip())


def _beginning_at_the_end(text: str, tag: str) -> int:
    """Length of the longest beginning of a tag, not the whole, in which a text ends."""
    return next((size for size in range(len(tag) - 1, 0, -1) if text.endswith(tag[:size])), 0)


def _within_string(text: str) -> bool:
    """Whether some JSON breaks off within a string."""
    try:
        json.loads(text)
    except ValueError as error:
        return isinstance(error, json.JSONDecodeError) and error.msg.startswith("Unterminated string")
    except RecursionError:
        return False
    return False
