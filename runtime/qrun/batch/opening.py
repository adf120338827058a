"""Which kind of file an input is, and how its rows become requests."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qrun.batch.parquet import Parquet, need_pyarrow
from qrun.batch.requests import BatchLines, Prompts, Template
from qrun.batch.sources import Csv, Format, JsonLines, PlainText, Source
from qrun.errors import QrunError

_SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".txt": "text",
}
_COMPRESSED = {
    b"\x1f\x8b": "gunzip -c",
    b"BZh": "bunzip2 -c",
    b"\xfd7zXZ": "xz -dc",
    b"\x28\xb5\x2f\xfd": "zstd -dc",
}
_OBJECTS = re.compile(rb"\[\s*\{")
FORMATS: tuple[Format, ...] = ("jsonl", "csv", "parquet", "text")


# What makes requests of rows.
Maker = Prompts | BatchLines


@dataclass(frozen=True)
class Wanted:
    """What the user says of the input.

    Attributes:
        format: None for what its name and its first bytes say.
        column, template, system: see ``Prompts``; None where they were not given.
        chat: see ``Prompts``.
    """

    format: Format | None = None
    column: str | None = None
    template: str | None = None
    system: str | None = None
    chat: bool = True


def open_source(path: Path, kind: Format | None = None, *, name: Path | None = None) -> Source:
    """The rows of a file.

    Args:
        path: where it lies.
        kind: its format; by default what its name and its first bytes say.
        name: what the user calls it, where that is not its path.

    Raises:
        QrunError: it is empty, packed, or no such file.
    """
    shown = name or path
    with path.open("rb") as file:
        head = file.read(4096)
    if not head.strip():
        raise QrunError("the input is empty: there is nothing to answer", where=shown)
    for magic, unpack in _COMPRESSED.items():
        if head.startswith(magic):
            raise QrunError(
                "the input is packed", where=shown, hint=f"{unpack} {shown} | qrun batch ... - --output ..."
            )
    told, kind = kind, kind or _SUFFIXES.get(shown.suffix.lower()) or _sniffed(head)
    if kind == "parquet":
        return Parquet(path)
    if head.startswith(b"PAR1"):
        raise QrunError(
            "this is a Parquet file", where=shown, hint="give --format parquet, or name it .parquet"
        )
    if b"\0" in head:
        raise QrunError(
            "the input is no text: there are zero bytes in it",
            where=shown,
            hint="give UTF-8 (iconv -f UTF-16 -t UTF-8), JSON lines, CSV or Parquet",
        )
    if kind in ("jsonl", "text") and told != "text" and _is_array(head, shown):
        raise QrunError(
            "this is one JSON array, and one object a line is needed",
            where=shown,
            hint=f"jq -c '.[]' {shown} gives them; or --format text, if each line is a prompt",
        )
    if kind == "csv":
        return Csv(path, "\t" if shown.suffix.lower() == ".tsv" else ",")
    return JsonLines(path) if kind == "jsonl" else PlainText(path)


def output_format(path: Path, *, batch_lines: bool) -> Format:
    """The format of an output, by its name.

    Raises:
        QrunError: the name says none, or one that cannot be written; or pyarrow is not installed.
    """
    kind = _SUFFIXES.get(path.suffix.lower())
    if kind in (None, "text") or path.suffix.lower() == ".tsv":
        raise QrunError(
            f"the name of the output does not say its format: {path.name}",
            where="--output",
            hint="let it end in .jsonl, .csv or .parquet",
        )
    if batch_lines and kind != "jsonl":
        raise QrunError(
            "OpenAI's batch lines are answered in JSON lines",
            where="--output",
            hint=f"let it end in .jsonl: {path.with_suffix('.jsonl').name}",
        )
    if kind == "parquet":
        need_pyarrow(path)
    assert kind is not None, "it was looked at"
    return kind


def maker_of(source: Source, wanted: Wanted) -> Maker:
    """How the rows of a source become requests.

    Raises:
        QrunError: no row can be read, no column holds the prompt, or none that was named.
    """
    first = _first_values(source)
    given = wanted.column is not None or wanted.template is not None
    if isinstance(source, JsonLines) and not given and ("body" in first or "custom_id" in first):
        if wanted.system is not None:
            raise QrunError(
                "--system has no place here: OpenAI's batch lines have messages of their own",
                where=source.path,
                hint="leave it out, or give --column or --template",
            )
        return BatchLines()
    columns = tuple(first) if source.columns is None else source.columns
    template = None if wanted.template is None else Template(wanted.template)
    column = None
    if template is None:
        column = _only(columns) if wanted.column is None else wanted.column
        if wanted.column is None and column is not None and source.columns is not None:
            _check_separator(column, source)
        if column is None:
            raise QrunError(
                f"which column holds the prompt? There are: {', '.join(columns) or 'none'}",
                where=source.path,
                hint="give --column NAME, or --template with several",
            )
        if column not in columns and (source.columns is not None or first):
            raise QrunError(
                f"there is no column {column!r}; there are: {', '.join(columns)}", where=source.path
            )
    elif source.columns is not None:
        template.check(source.columns)
    return Prompts(column, template, wanted.system, wanted.chat)


def _first_values(source: Source) -> Mapping[str, Any]:
    """Of the first row that can be read; nothing where there are no rows.

    Raises:
        QrunError: there are some, and none can be read.
    """
    problem = None
    for row in source.rows():
        if row.problem is None:
            return row.values
        problem = problem or row.problem
    if problem is not None:
        raise QrunError(f"no row of the input can be read: {problem.message}", where=source.path)
    return {}


def _check_separator(column: str, source: Source) -> None:
    """Refuse a header that names several columns in another way than with commas.

    Raises:
        QrunError: its only column's name holds a separator of others.
    """
    for separator, hint in (
        (";", "separate columns with commas"),
        ("\t", "name the file .tsv"),
        ("|", "separate columns with commas"),
    ):
        if separator in column:
            raise QrunError(
                f"the header has one column, {column!r}: are its columns separated otherwise?",
                where=source.path,
                hint=f"{hint}; or give --column {column!r}, if it is one",
            )


def _only(columns: tuple[str, ...]) -> str | None:
    if "prompt" in columns:
        return "prompt"
    return columns[0] if len(columns) == 1 else None


def _is_array(head: bytes, shown: Path) -> bool:
    """Whether a file begins as one array of JSON. The first line of a text may begin with a bracket, too."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    return text.startswith(b"[") and (shown.suffix.lower() == ".json" or bool(_OBJECTS.match(text)))


def _sniffed(head: bytes) -> Format:
    if head.startswith(b"PAR1"):
        return "parquet"
    return "jsonl" if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{") else "text"
