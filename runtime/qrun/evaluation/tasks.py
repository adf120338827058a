"""One line of the data: what is asked, and what a good answer is."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, cast, get_args

from qrun.batch.sources import json_rows, numbered
from qrun.errors import QrunError
from qrun.evaluation.matching import Match

Kind = Match | Literal["choice", "perplexity"]
KINDS: tuple[Kind, ...] = ("exact", "contains", "regex", "choice", "perplexity")

_FIELDS = ("id", "group", "note", "prompt", "messages", "system", "expected", "match", "choices", "text")
ROLES = ("system", "user", "assistant", "tool")
_OF_TEXT = ("id", "group", "note", "text")
_SHOWN = 5  # faults of a file that are told one by one


@dataclass(frozen=True)
class Task:
    """One line.

    Attributes:
        number: of the line in the file, from 1.
        name: its own id, else "line" and its number.
        kind: how its answer is judged.
        group: of lines that are also summed up by themselves; None for none.
        messages: the conversation that is to be answered; one turn of the user's where a prompt was given.
        prompt: the text that is continued where no chat is meant; None where messages were given.
        expected: texts or expressions of which one is to be met; the right choice alone; empty for a text.
        choices: of which the likeliest is the answer.
        text: whose perplexity is measured.
    """

    number: int
    name: str
    kind: Kind
    group: str | None = None
    messages: tuple[Mapping[str, Any], ...] = ()
    prompt: str | None = None
    expected: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    text: str = ""

    @property
    def asked(self) -> str:
        """What is asked, for people."""
        if self.kind == "perplexity":
            return self.text
        return self.prompt if self.prompt is not None else str(self.messages[-1].get("content", ""))


def read_tasks(path: Path, match: Match = "contains") -> tuple[list[Task], str]:
    """All lines of a file, and its SHA-256; ``match`` is for lines that do not name theirs.

    The file is read once: a pipe can be, and what is told of it is what was judged.

    Raises:
        QrunError: the file cannot be read, is empty, or has lines that cannot be used: the first of them by
            their numbers.
    """
    if path.is_dir():
        raise QrunError("this is a folder, not a file of JSON lines", where=path)
    content = path.read_bytes()
    return _tasks(content, path, match), sha256(content).hexdigest()


def _tasks(content: bytes, path: Path, match: Match) -> list[Task]:
    tasks, faults, names = [], list[str](), dict[str, int]()
    for row in json_rows(numbered(BytesIO(content))):
        if row.problem is not None:
            faults.append(row.problem.message)
            continue
        try:
            task = read_task(row.number, row.values, match)
        except QrunError as error:
            faults.append(f"line {row.number:,}: {error.what}")
            continue
        if (first := names.setdefault(task.name, row.number)) != row.number:
            faults.append(f"line {row.number:,}: id {task.name!r} is that of line {first:,} too")
        tasks.append(task)
    if faults:
        more = f"; and {len(faults) - _SHOWN:,} more lines" if len(faults) > _SHOWN else ""
        raise QrunError(
            "; ".join(faults[:_SHOWN]) + more, where=path, hint="docs/evaluation.md has the kinds of lines"
        )
    if not tasks:
        raise QrunError(
            "the file has no lines",
            where=path,
            hint='such as {"prompt": "Capital of Italy?", "expected": "Rome"}',
        )
    return tasks


def read_task(number: int, values: Mapping[str, Any], match: Match) -> Task:
    """One line.

    Raises:
        QrunError: it cannot be used; the message names the field.
    """
    _check_fields(values)
    group = _text(values, "group") if "group" in values else None
    name = str(values.get("id", f"line {number}"))
    if "text" in values:
        odd = [key for key in values if key not in _OF_TEXT]
        if odd:
            raise QrunError(f"{', '.join(odd)} has no place beside text, whose perplexity is measured")
        return Task(number, name, "perplexity", group, text=_text(values, "text"))
    messages, prompt = _conversation(values)
    if "expected" not in values:
        raise QrunError("expected is missing: what a right answer is (or text, to measure its perplexity)")
    if "choices" in values:
        if "match" in values:
            raise QrunError("match has no place beside choices, of which the likeliest is taken")
        choices = _choices(values["choices"])
        right = _right_choice(values["expected"], choices)
        return Task(number, name, "choice", group, messages, prompt, (right,), choices)
    kind = values.get("match", match)
    if kind not in get_args(Match):
        raise QrunError(f"match is {kind!r}, not one of {', '.join(get_args(Match))}")
    expected = _expected(values["expected"])
    if kind == "regex":
        for each in expected:
            _check_expression(each)
    return Task(number, name, cast("Match", kind), group, messages, prompt, expected)


def _check_fields(values: Mapping[str, Any]) -> None:
    for key in values:
        if key not in _FIELDS:
            near = difflib.get_close_matches(key, _FIELDS, 1)
            known = f"did you mean {near[0]}?" if near else f"known are {', '.join(_FIELDS)}"
            raise QrunError(f"{key!r} is no field of a line ({known})")
    name = values.get("id", "")
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise QrunError("id must be a text or a whole number")


def _conversation(values: Mapping[str, Any]) -> tuple[tuple[Mapping[str, Any], ...], str | None]:
    if ("prompt" in values) == ("messages" in values):
        both = "prompt and messages exclude each other" if "prompt" in values else "prompt is missing"
        raise QrunError(both)
    system = [{"role": "system", "content": _text(values, "system")}] if "system" in values else []
    if "prompt" in values:
        prompt = _text(values, "prompt")
        return (*system, {"role": "user", "content": prompt}), None if system else prompt
    given = values["messages"]
    shaped = isinstance(given, list) and all(
        isinstance(each, dict) and isinstance(each.get("role"), str) and isinstance(each.get("content"), str)
        for each in given
    )
    if not shaped or not given:
        raise QrunError('messages must be a list such as [{"role": "user", "content": "Hello"}]')
    # Templates leave out a message whose role they do not know, and the model would never see it.
    role = next((each["role"] for each in given if each["role"] not in ROLES), None)
    if role is not None:
        raise QrunError(f"the role {role!r} in messages is none of {', '.join(ROLES)}")
    more = next((name for each in given for name in each if name not in ("role", "content", "name")), None)
    if more is not None:
        raise QrunError(f"{more!r} in messages is not read: they have a role and a content")
    if given[-1]["role"] == "assistant":
        raise QrunError("the last of messages is the assistant's: there is nothing to answer")
    return (*system, *given), None


def _text(values: Mapping[str, Any], key: str) -> str:
    found = values[key]
    if not isinstance(found, str):
        raise QrunError(f"{key} must be a text, not {type(found).__name__}")
    if not found.strip():
        raise QrunError(f"{key} is empty")
    return found


def _expected(found: Any) -> tuple[str, ...]:
    several = found if isinstance(found, list) else [found]
    if not several:
        raise QrunError("expected is an empty list: nothing would be right")
    return tuple(_answer(each, "expected") for each in several)


def _answer(found: Any, key: str) -> str:
    """A text, or a whole number that stands for its digits; 0.5 could be written in many ways."""
    if isinstance(found, int) and not isinstance(found, bool):
        return str(found)
    if not isinstance(found, str):
        raise QrunError(f"{key} must be a text, a whole number or a list of them, not {type(found).__name__}")
    if not found.strip():
        raise QrunError(f"{key} is empty")
    return found


def _choices(found: Any) -> tuple[str, ...]:
    if not isinstance(found, list) or len(found) < 2:
        raise QrunError("choices must be a list of two or more")
    choices = tuple(_answer(each, "a choice") for each in found)
    twice = next((each for each in choices if choices.count(each) > 1), None)
    if twice is not None:
        raise QrunError(f"the choice {twice!r} stands twice")
    return choices


def _right_choice(found: Any, choices: tuple[str, ...]) -> str:
    """The right one, by its text, or by its place from 0 where it is a number that is no choice itself."""
    if not isinstance(found, str | int) or isinstance(found, bool):
        raise QrunError("expected must be one of the choices, or its place from 0")
    if str(found) in choices:
        return str(found)
    if isinstance(found, int) and 0 <= found < len(choices):
        return choices[found]
    raise QrunError(f"expected {found!r} is none of the {len(choices)} choices")


def _check_expression(text: str) -> None:
    try:
        re.compile(text)
    except re.error as error:
        raise QrunError(f"expected {text!r} is no regular expression: {error}") from None


def groups_of(tasks: Iterable[Task]) -> list[str]:
    """Names of groups in the order in which they appear."""
    return list(dict.fromkeys(task.group for task in tasks if task.group is not None))
