"""Rows of a file: JSON lines, CSV, plain text. ``parquet.py`` has the fourth kind."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec

from qrun.batch.lines import Problem
from qrun.errors import QrunError

Format = Literal["jsonl", "csv", "parquet", "text"]
# Columns of a CSV file may hold whole documents; the csv module's own limit is 128 KiB.
_LARGEST_FIELD = 1 << 30
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Row:
    """One row of the input.

    Attributes:
        number: its place, from 1: its (first) line in a text file, its row in a table.
        values: by column; empty where the row cannot be read.
        problem: why it cannot be read.
    """

    number: int
    values: Mapping[str, Any] = field(default_factory=dict)
    problem: Problem | None = None


class Source(Protocol):
    """A file of rows, which may be read several times.

    Attributes:
        path: of the file.
    """

    path: Path

    @property
    def columns(self) -> tuple[str, ...] | None:
        """Their names; None where each row has its own (JSON lines)."""
        ...

    def rows(self) -> Iterator[Row]:
        """All rows in order, those that cannot be read too.

        Raises:
            QrunError: the file as a whole cannot be read.
        """
        ...


class JsonLines:
    """One JSON object a line; blank lines are passed over."""

    columns = None

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> Iterator[Row]:
        return json_rows(_lines(self.path))


class PlainText:
    """One prompt a line, as the column ``prompt``."""

    columns = ("prompt",)

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> Iterator[Row]:
        for number, line in _lines(self.path):
            text, problem = _text(number, line.rstrip(b"\r\n"))
            yield Row(number, {"prompt": text}, problem)


class Csv:
    """Comma-separated values with a header; a row may go over several lines.

    Raises:
        QrunError: there is no header, or one with a name twice or that is not UTF-8.
    """

    def __init__(self, path: Path, separator: str = ",") -> None:
        self.path, self._separator = path, separator
        csv.field_size_limit(_LARGEST_FIELD)
        try:
            header = next(self._reader(), None)
        except csv.Error as error:
            raise QrunError(f"the header cannot be read: {error}", where=path) from None
        if not header:
            raise QrunError(
                "the file has no header", where=path, hint="its first line names the columns: id,text"
            )
        if any(not _is_text(name) for name in header):
            raise QrunError(
                "the header is not UTF-8", where=path, hint=f"iconv -f LATIN1 -t UTF-8 {path} gives it"
            )
        check_names(header, path)
        self.columns: tuple[str, ...] = tuple(header)

    def rows(self) -> Iterator[Row]:
        reader = self._reader()
        next(reader)
        while True:
            number = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                text = f"line {number:,} is no row of CSV: {error}"
                yield Row(number, problem=Problem("invalid_csv", text))
                continue
            if fields:
                yield self._row(number, fields)

    def _row(self, number: int, fields: list[str]) -> Row:
        clean = [each.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for each in fields]
        values = dict(zip(self.columns, clean))
        if len(fields) != len(self.columns):
            text = f"line {number:,} has {len(fields)} fields and the header {len(self.columns)}"
            return Row(number, values, Problem("invalid_csv", text))
        if clean != fields:
            return Row(number, values, _not_utf8(number))
        return Row(number, values)

    def _reader(self) -> Any:
        # Bytes that are no UTF-8 spoil their own row only.
        text = (line.decode("utf-8", "surrogateescape") for _, line in _lines(self.path))
        return csv.reader(text, delimiter=self._separator, strict=True)


def check_names(columns: Sequence[str], path: Path) -> None:
    """Refuse columns that a row could not tell apart.

    Raises:
        QrunError: two have the same name.
    """
    twice = next((name for name in columns if columns.count(name) > 1), None)
    if twice is not None:
        raise QrunError(f"two columns are called {twice!r}", where=path, hint="rename one of them")


def _is_text(found: str) -> bool:
    """Whether these were bytes of UTF-8."""
    return not any("\udc80" <= letter <= "\udcff" for letter in found)


def json_rows(lines: Iterable[tuple[int, bytes]]) -> Iterator[Row]:
    """A row for each line that is not blank; ``lines`` come with their numbers."""
    for number, line in lines:
        if line.strip():
            yield _json_row(number, line)


def _json_row(number: int, line: bytes) -> Row:
    try:
        values = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return Row(number, problem=Problem("invalid_json", f"line {number:,} is not JSON: {error}"))
    if not isinstance(values, dict):
        text = f"line {number:,} is no JSON object, but {_kind(values)}"
        return Row(number, problem=Problem("invalid_json", text))
    return Row(number, values)


def numbered(lines: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers, without the mark that some editors begin a file with."""
    for number, line in enumerate(lines, 1):
        yield number, line.removeprefix(_BOM) if number == 1 else line


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        yield from numbered(file)


def _text(number: int, line: bytes) -> tuple[str, Problem | None]:
    try:
        return line.decode(), None
    except UnicodeDecodeError:
        return line.decode(errors="replace"), _not_utf8(number)


def _not_utf8(number: int) -> Problem:
    return Problem("invalid_text", f"line {number:,} is not UTF-8")


def _kind(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else f"{text[:37]}..."
