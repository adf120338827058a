"""The two nouns of a batch: a line that asks, and the record that answers it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

CHAT_URL = "/v1/chat/completions"
COMPLETION_URL = "/v1/completions"


@dataclass(frozen=True)
class Problem:
    """Why a line cannot be asked.

    Attributes:
        code: its kind, for programs and for the summary.
        message: one sentence for people.
    """

    code: str
    message: str


@dataclass(frozen=True)
class Line:
    """One request of a batch.

    Attributes:
        number: its place in the input, from 1: the line of a text file, the row of a table.
        url: the API that it asks, such as "/v1/chat/completions".
        body: what is asked, in the fields of this API.
        custom_id: the name that the input has for it.
        problem: why it is no request; url and body then mean nothing.
    """

    number: int
    url: str = CHAT_URL
    body: Mapping[str, Any] = field(default_factory=dict)
    custom_id: str | None = None
    problem: Problem | None = None


@dataclass(frozen=True)
class Record:
    """The answer to a line, or why there is none.

    Attributes:
        number, custom_id: of the line.
        status: 200, or that of HTTP with which a server would refuse it; 0 where the line is no request.
        body: the API's answer or error object, as a server would send it.
        error: the kind of the error, None for an answer.
        message: what is wrong, for people.
        text: the (first) answer's text.
        finish_reason: of the first answer, in the API's words.
        tool_calls: those of the first answer.
        prompt_tokens, completion_tokens: of all answers to the line.
    """

    number: int
    custom_id: str | None = None
    status: int = 200
    body: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    message: str | None = None
    text: str | None = None
    finish_reason: str | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0


def refused(line: Line, problem: Problem, status: int = 0, body: Mapping[str, Any] | None = None) -> Record:
    """The record of a line that cannot be answered."""
    return Record(
        *(line.number, line.custom_id, status, body or {}), error=problem.code, message=problem.message
    )
