"""Output files: JSON lines, CSV, Parquet; published when they are whole, or growing as answers come."""

from __future__ import annotations

import csv
import io
import json
import os
import zlib
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import msgspec

from qrun.batch.journal import Journal, sync
from qrun.batch.lines import Record
from qrun.batch.parquet import Parquet, write_beside, write_rows
from qrun.batch.shapes import answer_columns, answer_types, batch_output
from qrun.batch.sources import Format, Row, Source
from qrun.errors import QrunError

_BLOCK = 1 << 20


class Shape(Protocol):
    """What a record looks like in the output."""

    def values(self, row: Row, record: Record) -> dict[str, Any]:
        """One line of the output, by column."""
        ...


@dataclass(frozen=True)
class BatchShape:
    """OpenAI's batch output lines; ``name`` is the job's."""

    name: str

    def values(self, row: Row, record: Record) -> dict[str, Any]:
        """One line of the output."""
        return batch_output(record, self.name)


@dataclass(frozen=True)
class TableShape:
    """The input's columns, then the answer's."""

    prefix: str = ""
    tools: bool = False

    def values(self, row: Row, record: Record) -> dict[str, Any]:
        """One line of the output."""
        return {**row.values, **answer_columns(record, self.prefix, tools=self.tools)}

    @property
    def types(self) -> Mapping[str, type]:
        """The answer's columns."""
        return answer_types(self.prefix, tools=self.tools)


def line_writer(kind: Format, columns: Sequence[str]) -> tuple[bytes, Callable[[Mapping[str, Any]], bytes]]:
    """What an output begins with, and what makes a line of it.

    Args:
        kind: "jsonl" or "csv".
        columns: of a CSV file.
    """
    if kind == "jsonl":
        return b"", lambda values: msgspec.json.encode(values) + b"\n"
    return _csv_line(columns), lambda values: _csv_line([_cell(values.get(name)) for name in columns])


class Growing:
    """An output that grows by whole lines as answers come; a restart goes on behind the last one.

    Raises:
        QrunError: somebody has changed the file since.
    """

    def __init__(self, journal: Journal, kind: Format, columns: Sequence[str], shape: Shape) -> None:
        self._journal, self._shape = journal, shape
        head, self._line = line_writer(kind, columns)
        self._head, self._file = head, cast("io.FileIO | None", None)
        self._end, self._crc = len(head), zlib.crc32(head)
        path = journal.output
        journal.rewind(path.stat().st_size if path.exists() else 0)
        if (last := journal.last) is not None:
            self._end, self._crc = last.end, last.crc
            self._file = path.open("r+b", buffering=0)
            if _crc_of(self._file, self._end) != self._crc:
                raise changed_meanwhile(path)
            self._file.truncate(self._end)
        elif path.exists() and not (path.stat().st_size <= len(head) and head.startswith(path.read_bytes())):
            raise changed_meanwhile(path)

    def add(self, row: Row, record: Record) -> None:
        """Write a line, and then the journal's entry, which says that it is whole."""
        if self._file is None:  # not before there is something to write
            self._file = self._journal.output.open("wb", buffering=0)
            self._write(self._head)
            self._journal.add(None, end=self._end, crc=self._crc)
        line = self._line(self._shape.values(row, record))
        try:
            self._write(line)
        except OSError:
            self._file.truncate(self._end)
            self._file.seek(self._end)
            raise
        self._end, self._crc = self._end + len(line), zlib.crc32(line, self._crc)
        self._journal.add(record, end=self._end, crc=self._crc)

    def close(self) -> None:
        """Write everything to the disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()

    def _write(self, content: bytes) -> None:
        assert self._file is not None, "it was opened before"
        left = memoryview(content)
        while left:
            left = left[self._file.write(left) :]


def _crc_of(file: io.FileIO, length: int) -> int:
    """Of the first bytes of a file, which may be larger than the memory; it then stands behind them."""
    crc = 0
    while length and (block := file.read(min(length, _BLOCK))):
        crc, length = zlib.crc32(block, crc), length - len(block)
    return crc


def changed_meanwhile(path: Path) -> QrunError:
    """Somebody has written to the output of a job that is not finished."""
    return QrunError(
        f"{path.name} was changed since this job was stopped, and is left as it is",
        where=path,
        hint="move it away and start over with --force, or give another --output",
    )


def check_columns(rows: Iterable[Row], columns: Sequence[str]) -> None:
    """Refuse rows whose values a Parquet file cannot hold, before the hours of work for it.

    Raises:
        QrunError: names the column.
    """
    write_rows(None, (row.values for row in rows), tuple(columns))


def write_output(
    path: Path, kind: Format, columns: Sequence[str], content: tuple[Source, Shape, Journal]
) -> None:
    """Write all records in the order of the input; ``content`` are its rows, their shape and the records."""
    source, shape, journal = content
    if kind == "parquet":
        assert isinstance(shape, TableShape), "batch lines are JSON lines"
        if isinstance(source, Parquet):
            numbers = iter(range(1, len(journal.done) + 1))
            added = (answer_columns(journal.get(n), shape.prefix, tools=shape.tools) for n in numbers)
            write_beside(path, source, added, shape.types)
        else:
            write_rows(path, _values(source, shape, journal), tuple(columns))
        return
    head, line = line_writer(kind, columns)
    with path.open("wb") as file:
        file.write(head)
        for values in _values(source, shape, journal):
            file.write(line(values))
        sync(file)


def _values(source: Source, shape: Shape, journal: Journal) -> Iterator[dict[str, Any]]:
    for row in source.rows():
        yield shape.values(row, journal.get(row.number))


def _csv_line(fields: Sequence[Any]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(fields)
    return text.getvalue().encode("utf-8", "replace")


def _cell(value: Any) -> Any:
    """A value in CSV: texts and numbers as they are, nothing for None, all else as in JSON lines."""
    if isinstance(value, bool | dict | list):
        return json.dumps(value, ensure_ascii=False, default=_in_json)
    return b64encode(value).decode() if isinstance(value, bytes) else value


def _in_json(value: object) -> str:
    return b64encode(value).decode() if isinstance(value, bytes) else str(value)
