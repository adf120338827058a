"""From a row of the input to a request: OpenAI's batch lines, a column, or a template over all columns."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jinja2
from jinja2 import meta

from qrun.batch.lines import CHAT_URL, COMPLETION_URL, Line, Problem
from qrun.batch.sources import Row
from qrun.errors import QrunError
from qrun.text.sandbox import sandbox


class Template:
    """A prompt in Jinja, whose variables are the row's columns. It runs in the sandbox of chat templates.

    Raises:
        QrunError: it is no template.
    """

    def __init__(self, text: str) -> None:
        if not text.strip():
            raise QrunError("the template is empty", where="--template", hint="such as '{{ text }}'")
        environment = sandbox()
        environment.undefined = jinja2.StrictUndefined
        environment.finalize = _printed
        del environment.globals["strftime_now"]  # a prompt would change from one day to the next
        try:
            self._names = meta.find_undeclared_variables(environment.parse(text)) - set(environment.globals)
            self._template = environment.from_string(text)
        except jinja2.TemplateError as error:
            raise QrunError(f"the template cannot be read: {error}", where="--template") from None

    def check(self, columns: Collection[str]) -> None:
        """Refuse a template that reads a column which there is not.

        Raises:
            QrunError: names the column.
        """
        for name in sorted(self._names):
            if name not in columns:
                raise QrunError(
                    f"there is no column {name!r}; there are: {', '.join(columns)}", where="--template"
                )

    def render(self, values: Mapping[str, Any]) -> str:
        """The prompt of a row.

        Raises:
            QrunError: a column that this row has not, one that is null and printed, or whatever else stops
                the template.
        """
        try:
            return self._template.render({str(name): value for name, value in values.items()})
        except Exception as error:  # a template may fail with any error of Python's
            raise QrunError(f"the template fails: {error or type(error).__name__}") from None


def _printed(value: Any) -> Any:
    """What a template prints: nothing would be asked as the word None."""
    if value is None:
        raise jinja2.TemplateRuntimeError("it prints a value that is null; {{ x or '' }} prints nothing then")
    return value


@dataclass(frozen=True)
class Prompts:
    """How a row of a table becomes a request.

    Attributes:
        column: the one that holds the prompt, a text or a list of messages.
        template: makes the prompt instead of a column.
        system: the system message of a chat.
        chat: whether the prompt is a turn of a chat, or a text that is continued.
    """

    column: str | None = None
    template: Template | None = None
    system: str | None = None
    chat: bool = True

    def lines(self, rows: Iterable[Row]) -> Iterator[Line]:
        """One line for each row, in order."""
        return map(self.line, rows)

    def trial(self) -> Line:
        """A request of this kind that nobody has asked, to find what stands against all of them."""
        return self._asked(0, "x")

    def line(self, row: Row) -> Line:
        """The request of a row."""
        if row.problem is not None:
            return Line(row.number, problem=row.problem)
        try:
            prompt = self._prompt(row.values)
        except QrunError as error:
            return Line(row.number, problem=Problem("invalid_row", f"row {row.number:,}: {error.what}"))
        return self._asked(row.number, prompt)

    def _asked(self, number: int, prompt: str | list[Any]) -> Line:
        if not self.chat:
            return Line(number, COMPLETION_URL, {"prompt": prompt})
        turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return Line(number, CHAT_URL, {"messages": [*system, *turns]})

    def _prompt(self, values: Mapping[str, Any]) -> str | list[Any]:
        if self.template is not None:
            found: Any = self.template.render(values)
        else:
            assert self.column is not None, "a column or a template"
            if self.column not in values:
                raise QrunError(f"there is no column {self.column!r}")
            found = values[self.column]
        if isinstance(found, list) and self.chat:
            return found
        if not isinstance(found, str):
            raise QrunError(f"column {self.column!r} holds {type(found).__name__}, not a text")
        if not found.strip():
            raise QrunError("the prompt is empty: there is nothing to answer")
        return found


@dataclass
class BatchLines:
    """OpenAI's batch lines: ``custom_id``, ``method``, ``url``, ``body``. A custom_id stands only once."""

    _seen: set[str] = field(default_factory=set)

    def lines(self, rows: Iterable[Row]) -> Iterator[Line]:
        """One line for each row, in order."""
        self._seen.clear()
        return map(self.line, rows)

    def line(self, row: Row) -> Line:
        """The request of a row."""
        if row.problem is not None:
            return Line(row.number, problem=row.problem)
        values = row.values
        custom_id = values.get("custom_id")
        name = custom_id if isinstance(custom_id, str) else None
        what = self._what_is_wrong(values)
        if what is not None:
            problem = Problem("invalid_line", f"line {row.number:,}: {what}")
            return Line(row.number, custom_id=name, problem=problem)
        assert name is not None, "it was looked at"
        if name in self._seen:
            text = f"line {row.number:,}: custom_id {name!r} stands in an earlier line too"
            return Line(row.number, custom_id=name, problem=Problem("duplicate_custom_id", text))
        self._seen.add(name)
        return Line(row.number, values["url"], values["body"], name)

    def _what_is_wrong(self, values: Mapping[str, Any]) -> str | None:
        for key, kind, words in (
            ("custom_id", str, "a text"),
            ("url", str, "a text such as /v1/chat/completions"),
            ("body", dict, "an object"),
        ):
            if key not in values:
                return f"{key} is missing"
            if not isinstance(values[key], kind):
                return f"{key} must be {words}"
        if values.get("method", "POST") != "POST":
            return f"method must be POST, not {values['method']!r}"
        extra = next((key for key in values if key not in ("custom_id", "method", "url", "body")), None)
        return None if extra is None else f"{extra} is not supported here"
