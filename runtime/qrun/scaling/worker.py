"""One worker of a cluster: a model, and the answers to the rows that Ray hands to it."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qrun.batch.answering import Answerer, batch_engine
from qrun.batch.asking import DEFAULT_MAX_TOKENS, Asking, Defaults
from qrun.batch.lines import Record
from qrun.batch.opening import Maker, Wanted
from qrun.batch.outputs import BatchShape, TableShape
from qrun.batch.requests import BatchLines, Prompts, Template
from qrun.batch.rows import choose_rows
from qrun.batch.sources import Row
from qrun.engine import Engine
from qrun.model import Model
from qrun.scaling.folders import Folder, ready

_CHARACTERS_PER_TOKEN = 2.5


@dataclass(frozen=True)
class Work:
    """What all workers do.

    Attributes:
        folder, shelf: see ``folders.ready``.
        opening: of the model; threads are those of the worker.
        literal: whether special tokens in prompts stay text.
        wanted: how rows become requests, with the column that holds the prompt.
        batch_lines: whether they are OpenAI's batch lines instead.
        defaults: for lines that say nothing themselves.
        job: its name.
        shape: of table rows in the output.
        rows: prompts at once; None to measure.
        prefix_bytes: of memory, for beginnings of prompts.
        piece: tokens of a prompt that are read at once.
        cpus: of a worker, which are its threads.
    """

    folder: Folder
    shelf: Any
    opening: Mapping[str, Any]
    literal: bool
    wanted: Wanted
    batch_lines: bool
    defaults: Defaults
    job: str
    shape: TableShape
    rows: int | None
    prefix_bytes: int
    piece: int
    cpus: int


class Worker:
    """An actor: opens the model once, and answers tables of rows."""

    def __init__(self, work: Work) -> None:
        place, _ = ready(work.folder, work.shelf)
        self._work = work
        self._model = Model.open(place, threads=work.cpus, **work.opening)
        self._model.literal = work.literal
        self._engine: Engine | None = None
        wanted = work.wanted
        # Made here, since a compiled template cannot travel.
        template = None if wanted.template is None else Template(wanted.template)
        self._maker: Maker = (
            BatchLines() if work.batch_lines else Prompts(wanted.column, template, wanted.system, wanted.chat)
        )

    def __call__(self, table: Any) -> Any:
        """Answered rows for a table of rows; see ``files``."""
        import pyarrow

        rows: list[Row] = [pickle.loads(each) for each in table["row"].to_pylist()]  # noqa: S301 (our own)
        files: list[str] = table["file"].to_pylist()
        found: dict[int, Record] = {}
        for file in dict.fromkeys(files):  # rows of several files may have the same numbers
            places = {row.number: place for place, row in enumerate(rows) if files[place] == file}
            for record in self._answers(file, [rows[place] for place in places.values()]):
                found[places[record.number]] = record
        records = [found[place] for place in range(len(rows))]
        values = [self._values(file, row, record) for file, row, record in zip(files, rows, records)]
        return pyarrow.table(
            {
                "key": table["key"],
                "row": pyarrow.array([pickle.dumps(each) for each in values], pyarrow.binary()),
                "error": pyarrow.array([record.error for record in records], pyarrow.string()),
                "prompt_tokens": pyarrow.array([each.prompt_tokens for each in records], pyarrow.int64()),
                "completion_tokens": pyarrow.array(
                    [each.completion_tokens for each in records], pyarrow.int64()
                ),
            }
        )

    def _answers(self, file: str, rows: list[Row]) -> Iterator[Record]:
        if self._engine is None:
            count = (
                self._work.rows
                or choose_rows(
                    self._model, lines=len(rows), tokens=self._tokens(rows), reserved=self._work.prefix_bytes
                ).count
            )
            self._engine = batch_engine(self._model, count, self._work.prefix_bytes, self._work.piece)
        asking = Asking(self._engine, self._work.defaults, name=self._name(file))
        yield from Answerer(asking).answer(self._maker.lines(rows))

    def _values(self, file: str, row: Row, record: Record) -> dict[str, Any]:
        if self._work.batch_lines:
            return BatchShape(self._name(file)).values(row, record)
        return self._work.shape.values(row, record)

    def _name(self, file: str) -> str:
        """Ids of answers follow from it, so that those of two files differ."""
        return f"{self._work.job}\n{file}"

    def _tokens(self, rows: list[Row]) -> int:
        """About those of the longest row with its answer."""
        longest = max(sum(len(str(value)) for value in row.values.values()) for row in rows)
        return int(longest / _CHARACTERS_PER_TOKEN) + (self._work.defaults.max_tokens or DEFAULT_MAX_TOKENS)
