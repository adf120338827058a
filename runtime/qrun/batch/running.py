"""A batch from its input to its output, on one screen: opened, answered, kept, published."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from time import monotonic
from typing import Any

from qrun import __version__
from qrun.batch.answering import Answerer, batch_engine
from qrun.batch.asking import Asking
from qrun.batch.beginnings import piece_tokens
from qrun.batch.job import Job, digest, model_facts
from qrun.batch.journal import Journal
from qrun.batch.lines import Line, Record
from qrun.batch.opening import Maker, maker_of, open_source, output_format
from qrun.batch.order import Order, Progress
from qrun.batch.outputs import BatchShape, Growing, Shape, TableShape, check_columns, write_output
from qrun.batch.parquet import Parquet
from qrun.batch.publishing import check_output, check_unpublished, identity, is_published, publish
from qrun.batch.requests import BatchLines
from qrun.batch.rows import Rows, choose_rows
from qrun.batch.sources import Format, Row, Source
from qrun.errors import QrunError
from qrun.model import Model

# Characters of a token, few enough that a prompt is seldom longer than it is taken for.
_CHARACTERS_PER_TOKEN = 2.5

Watch = Callable[[Progress], None]


def run(order: Order, model: Model, watch: Watch = lambda progress: None) -> dict[str, Any]:
    """Do a job, or go on with it; returns its summary.

    Raises:
        QrunError: the input or the output is no good, the job is another one, or there are too many errors.
            What was answered until then is kept, except where that is nothing.
    """
    check_output(order)
    journal = Journal(order.output)
    try:
        return _Run(order, model, journal, watch).run()
    finally:
        if journal.is_empty:
            journal.remove()
        journal.release()


class _Run:
    """One start of a job."""

    def __init__(self, order: Order, model: Model, journal: Journal, watch: Watch) -> None:
        self._order, self._model, self._journal, self._watch = order, model, journal, watch
        self._shape: Shape
        self._source: Source
        self._maker: Maker
        self._kind: Format
        self._columns: tuple[str, ...] = ()

    def run(self) -> dict[str, Any]:
        order, journal = self._order, self._journal
        earlier = journal.read_job()
        self._open_input()
        job = self._job()
        if order.force:
            journal.remove_content(keep="input")
            earlier = None
        elif earlier is not None and journal.is_empty and not job.is_same(earlier["job"]):
            earlier = None  # of that job nothing was answered
        if earlier is None:
            self._begin(job)
        else:
            job.check_same(earlier["job"], journal.folder)
            if "summary" in earlier:  # it was killed when all was done but tidying up
                journal.remove_content()
                return dict(earlier["summary"])
        replaces = (journal.read_job() or {}).get("replaces")
        if not order.unordered:
            check_unpublished(order.output, journal, replaces)
        self._shape = self._shape_of(job)
        if self._kind == "parquet" and not isinstance(self._source, Parquet):
            check_columns(self._source.rows(), self._columns)
        journal.open()
        summary = self._answer(job, *self._measure()).to_json()
        if not order.unordered and not is_published(order.output, journal):
            self._write_whole()
            publish(order.output, journal, replaces)
        journal.write_job({"job": dict(job.facts), "summary": summary})
        journal.remove_content()
        return summary

    def _open_input(self) -> None:
        order, journal = self._order, self._journal
        shown = order.input or Path("standard input")
        path = shown
        if order.input is None or order.input.is_fifo():  # it can be read only once
            path = journal.path("input")
            coming = order.pipe if order.input is None else order.input.open("rb")
            assert coming is not None, "a file or a pipe"
            with closing(coming), path.open("wb") as file:
                shutil.copyfileobj(coming, file)
        self._source = open_source(path, order.wanted.format, name=shown)
        self._maker = maker_of(self._source, order.wanted)
        self._kind = output_format(order.output, batch_lines=isinstance(self._maker, BatchLines))
        if isinstance(self._maker, BatchLines) and order.prefix:
            raise QrunError(
                "--prefix has no place here: OpenAI's batch output lines have no columns",
                where=self._source.path,
                hint="leave it out",
            )
        if order.unordered and self._kind == "parquet":
            raise QrunError(
                "a Parquet file cannot grow line by line",
                where="--output",
                hint="leave --unordered out, or let the output end in .jsonl or .csv",
            )

    def _job(self) -> Job:
        order, wanted = self._order, self._order.wanted
        options = {
            **{"template": wanted.template, "column": wanted.column, "system": wanted.system},
            **{"chat": wanted.chat, "format": wanted.format, "prefix": order.prefix or None},
            **{"max_tokens": order.defaults.max_tokens, "seed": order.defaults.seed},
            **{"unordered": order.unordered, "output format": self._kind, "qrun": __version__},
            **order.defaults.fields,
        }
        model = {f"model ({name})": value for name, value in model_facts(self._model.manifest).items()}
        return Job({"input": digest(self._source.path), **options, **model})

    def _begin(self, job: Job) -> None:
        order = self._order
        replaces = None
        if order.output.exists():
            if not order.force:
                raise QrunError(
                    f"{order.output} exists already",
                    hint="give another --output, or --force to replace it",
                )
            replaces = identity(order.output)
            if order.unordered:
                order.output.unlink()
        self._journal.write_job({"job": dict(job.facts), "replaces": replaces})

    def _shape_of(self, job: Job) -> Shape:
        if isinstance(self._maker, BatchLines):
            return BatchShape(job.name)
        shape = TableShape(self._order.prefix, tools="tools" in self._order.defaults.fields)
        columns = self._source.columns
        if columns is None:
            seen: dict[str, None] = {}
            for row in self._source.rows():
                seen.update(dict.fromkeys(row.values))
            columns = tuple(seen)
        taken = next((name for name in shape.types if name in columns), None)
        if taken is not None:
            raise QrunError(
                f"the input has a column {taken!r}, which is the name of one of the answer's",
                where=self._source.path,
                hint="give --prefix, such as --prefix model_",
            )
        self._columns = (*columns, *shape.types)
        return shape

    def _measure(self) -> tuple[int, int]:
        """Lines of the input, and about the tokens of the longest one."""
        count = longest = 0
        for row in self._source.rows():
            count += 1
            longest = max(longest, sum(len(str(value)) for value in row.values.values()))
        if not count:
            raise QrunError("the input holds no line", where=self._source.path)
        return count, int(longest / _CHARACTERS_PER_TOKEN) + (self._order.defaults.max_tokens or 512)

    def _answer(self, job: Job, lines: int, tokens: int) -> Progress:
        order, journal = self._order, self._journal
        growing = Growing(journal, self._kind, self._columns, self._shape) if order.unordered else None
        before = len(journal.done)
        progress = Progress(lines, before, before)
        progress.take(journal.errors, journal.prompt_tokens, journal.completion_tokens)
        if before == lines:
            return progress
        progress.rows = (
            Rows(order.rows, "given")
            if order.rows is not None
            else choose_rows(self._model, lines=lines - before, tokens=tokens, reserved=order.prefix_bytes)
        )
        rows_by_number: dict[int, Row] = {}
        self._watch(progress)
        started = monotonic()
        piece = piece_tokens(self._source.rows(), self._maker, self._model.manifest)
        with batch_engine(self._model, progress.rows.count, order.prefix_bytes, piece) as engine:
            asking = Asking(engine, order.defaults, name=job.name)
            self._try_options(asking)
            left = self._left(rows_by_number if growing is not None else None)
            with closing(Answerer(asking).answer(left)) as records:
                for record in records:
                    if growing is not None:
                        growing.add(rows_by_number.pop(record.number), record)
                    else:
                        journal.add(record)
                    self._count(progress, record, started)
        if growing is not None:
            growing.close()
        return progress

    def _try_options(self, asking: Asking) -> None:
        """Refuse options that no line could be asked with: a schema, a tool, a variable of the template.

        Raises:
            QrunError: what a line would be refused for.
        """
        if isinstance(self._maker, BatchLines):
            fields = self._order.defaults.fields
            form = fields.get("response_format", {}).get("json_schema", {})
            self._model.constraint(schema=form.get("schema"), regex=fields.get("regex"))
            return
        found = asking.prepare(self._maker.trial())
        if isinstance(found, Record):
            raise QrunError(f"no line can be asked like this: {found.message}")

    def _left(self, kept: dict[int, Row] | None) -> Iterator[Line]:
        """Lines that are not answered yet; their rows are ``kept`` where they are wanted."""
        for row in self._source.rows():
            line = self._maker.line(row)
            if row.number not in self._journal.done:
                if kept is not None:
                    kept[row.number] = row
                yield line

    def _count(self, progress: Progress, record: Record, started: float) -> None:
        journal, most = self._journal, self._order.max_errors
        progress.done = len(journal.done)
        progress.take(journal.errors, journal.prompt_tokens, journal.completion_tokens)
        progress.new_prompt_tokens += record.prompt_tokens
        progress.new_completion_tokens += record.completion_tokens
        progress.seconds = monotonic() - started
        self._watch(progress)
        count = sum(journal.errors.values())
        if record.error is not None and most is not None and count > most:
            lines = f"{count:,} line{'s' if count > 1 else ''}"
            raise QrunError(
                f"{lines} could not be answered, and --max-errors is {most:,}; "
                f"the last one: {record.message}",
                where=self._source.path,
                hint="mend the input and start over with --force, or go on with a larger --max-errors",
            )

    def _write_whole(self) -> None:
        """Write all answers to a file of the job's folder."""
        new = self._journal.path("output.new")
        write_output(new, self._kind, self._columns, (self._source, self._shape, self._journal))
        new.replace(self._journal.path("output"))
