"""A batch over Ray, on one screen: joined, checked, read, answered, written, counted."""

from __future__ import annotations

import logging
import shutil
import tempfile
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any

from qrun import __version__
from qrun.batch.beginnings import piece_tokens
from qrun.batch.job import Job, model_facts
from qrun.batch.opening import Maker, Wanted, maker_of
from qrun.batch.order import Order
from qrun.batch.outputs import TableShape
from qrun.batch.parquet import Parquet, need_pyarrow
from qrun.batch.requests import BatchLines, Prompts
from qrun.batch.sources import Format, Source
from qrun.errors import QrunError
from qrun.folder.manifest import read_manifest
from qrun.scaling.cluster import first_line, join, nodes, refusal_of
from qrun.scaling.folders import folder_of
from qrun.scaling.placing import check_nodes, shelf_of

# Rows that a worker is given at once: what is lost with a worker that dies, and done again.
TABLE = 64
_SUFFIXES: Mapping[str, Format] = {".jsonl": "jsonl", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class Cluster:
    """What is said of the cluster.

    Attributes:
        address: "auto", or that of the head.
        workers: at most; None for as many as there is room for, also when nodes are added.
        cpus: of each worker, which are its threads; None for those of the smallest node less one, which Ray's
            reading and writing needs.
        file_rows: of an output file, but for the last ones.
    """

    address: str = "auto"
    workers: int | None = None
    cpus: int | None = None
    file_rows: int = 4096


def run_on_ray(
    order: Order,
    engine: Path,
    cluster: Cluster,
    *,
    places: tuple[str, str],
    opening: Mapping[str, Any],
    literal: bool,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Do a job on the workers of a cluster; returns its summary.

    Args:
        order: what is wanted, but for where.
        engine: the model folder.
        cluster: where.
        places: the input: a path, a folder, a pattern, or an address such as s3://bucket/*.parquet; and the
            output: a folder that does not exist yet.
        opening: more for ``Model.open``.
        literal: whether special tokens in prompts stay text.
        tell: shows a line to the person.

    Raises:
        QrunError: the input, the output, the cluster or a node's folder is no good; or rows were lost or
            doubled.
    """
    pattern, target = places
    need_pyarrow(Path(pattern))
    output = _Output(target)
    folder = folder_of(engine)
    join(cluster.address)
    from qrun.scaling.files import expand, fetched

    paths = expand(pattern)
    with tempfile.TemporaryDirectory(prefix="qrun-first-") as temporary:
        first = fetched(paths[0], Path(temporary))
        maker = maker_of(first, order.wanted)
        shape = TableShape(order.prefix, tools="tools" in order.defaults.fields)
        kind = _kind(output.path, first, maker)
        columns, schema = _columns(first, maker, shape, kind)
        job = _job(order, engine, paths)
        piece = piece_tokens(first.rows(), maker, read_manifest(engine))
    shelf = shelf_of(folder)
    here = check_nodes(folder, shelf, tell)
    cpus = cluster.cpus or max(1, min(each["cpus"] for each in here) - 1)
    work = {
        "folder": folder,
        "shelf": shelf,
        "opening": dict(opening),
        "literal": literal,
        "wanted": replace(order.wanted, column=maker.column if isinstance(maker, Prompts) else None),
        "batch_lines": isinstance(maker, BatchLines),
        "defaults": order.defaults,
        "job": job.name,
        "shape": shape,
        "rows": order.rows,
        "prefix_bytes": order.prefix_bytes,
        "piece": piece,
        "cpus": cpus,
    }
    tell(f"{len(paths):,} files; workers of {cpus} CPUs on {len(here)} nodes")
    started = monotonic()
    try:
        written, read = _answer(
            paths,
            order.wanted,
            work,
            (output.part, kind, columns, schema, cluster.file_rows),
            cluster.workers,
            columns=None if kind == "jsonl" else columns[: len(columns) - len(shape.types)],
        )
        if (written.rows, written.sum) != (read.rows, read.sum):
            raise QrunError(
                f"{read.rows:,} rows were read and {written.rows:,} written, or not the same ones",
                hint="the answers are not published; start again, and tell us",
            )
        output.publish()
    finally:
        output.tidy()
    seconds = monotonic() - started
    tokens = written.prompt_tokens + written.completion_tokens
    return {
        "lines": written.rows,
        "answered": written.rows - written.errors.total(),
        "errors": dict(sorted(written.errors.items())),
        "prompt_tokens": written.prompt_tokens,
        "completion_tokens": written.completion_tokens,
        "answered_before_this_start": 0,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 2),
        "completion_tokens_per_second": round(written.completion_tokens / seconds, 2),
        "rows": order.rows,
        "nodes": len(nodes()),
    }


def _answer(
    paths: list[str],
    wanted: Wanted,
    work: Mapping[str, Any],
    target: Any,
    workers: int | None,
    *,
    columns: tuple[str, ...] | None,
) -> tuple[Any, Any]:
    """What was written, and what was read; ``columns`` see ``files.Rows``."""
    import ray.data
    from ray.exceptions import RayError

    from qrun.scaling.files import Answers, Rows, Tally, tally
    from qrun.scaling.worker import Work, Worker

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_errored_blocks = 0
    taken = () if work["batch_lines"] else tuple(work["shape"].types)
    rows = ray.data.read_datasource(Rows(paths, wanted.format, columns, taken))
    pool = ray.data.ActorPoolStrategy(
        min_size=1,
        initial_size=_fitting(work["cpus"], workers),
        max_size=workers,
        max_tasks_in_flight_per_actor=2,
    )
    answered = rows.repartition(target_num_rows_per_block=TABLE).map_batches(
        Worker,
        fn_constructor_args=(Work(**work),),
        compute=pool,
        num_cpus=work["cpus"],
        batch_size=TABLE,
        batch_format="pyarrow",
    )
    sink = Answers(*target)
    try:
        answered.write_datasink(sink)
        read = Tally()
        for table in rows.select_columns(["key"]).iter_batches(batch_format="pyarrow", batch_size=4096):
            read.add(tally(table))
    except (RayError, RuntimeError, OSError) as error:
        raise refusal_of(error) or QrunError(
            f"Ray could not complete the job: {first_line(error)}"
        ) from error
    return sink.written, read


def _fitting(cpus: int, workers: int | None) -> int:
    """Workers that there is room for now, with one CPU left for reading and writing.

    A pool that begins with one worker gives it all tables of a short job, and leaves nothing for others.
    """
    here: list[int] = [each["cpus"] for each in nodes()]
    found = sum(each // cpus for each in here)
    if found * cpus >= sum(here):
        found -= 1
    return max(1, min(found, workers or found))


class _Output:
    """A folder that appears whole on this machine's disks; on a store its files appear one by one.

    Raises:
        QrunError: it exists already.
    """

    def __init__(self, path: str) -> None:
        self.path, self._local = path, "://" not in path
        self.part = path
        if self._local:
            whole = Path(path).expanduser().absolute()
            if whole.exists() or whole.is_symlink():
                raise QrunError("the output exists already", where=whole, hint="give another --output")
            if not whole.parent.is_dir():
                raise QrunError("there is no such folder", where=whole.parent, hint="make it first")
            self._whole, self._part = whole, whole.with_name(f".{whole.name}.{uuid.uuid4().hex[:8]}")
            self.part = str(self._part)

    def publish(self) -> None:
        """Give it its name."""
        if self._local:
            if self._whole.exists():
                raise QrunError("the output has appeared meanwhile, and is left as it is", where=self._whole)
            self._part.rename(self._whole)

    def tidy(self) -> None:
        """Remove what was not published."""
        if self._local:
            shutil.rmtree(self._part, ignore_errors=True)


def _kind(path: str, first: Source, maker: Maker) -> Format:
    """The output's format: what its name says, else the input's."""
    source: Format = "parquet" if isinstance(first, Parquet) else "csv" if first.columns else "jsonl"
    if first.columns == ("prompt",) and not isinstance(first, Parquet):  # plain text has no columns to keep
        source = "jsonl"
    kind = _SUFFIXES.get(Path(path).suffix.lower(), source)
    if isinstance(maker, BatchLines) and kind != "jsonl":
        raise QrunError("OpenAI's batch lines are answered in JSON lines", where=path)
    if first.columns is None and kind != "jsonl":
        raise QrunError(
            "JSON lines have no common columns that every worker knows",
            where=path,
            hint="let the output be JSON lines too: a name without an ending, or with .jsonl",
        )
    return kind


def _columns(first: Source, maker: Maker, shape: TableShape, kind: Format) -> tuple[tuple[str, ...], Any]:
    """Columns of the output, and its schema where it is Parquet."""
    from qrun.scaling.files import check_taken

    own = first.columns or ()
    if not isinstance(maker, BatchLines):
        names: Iterable[Collection[str]] = [own] if own else (row.values for row in first.rows())
        for each in names:
            check_taken(each, shape.types, first.path)
    if kind != "parquet":
        return (*own, *shape.types), None
    import pyarrow

    types = {str: pyarrow.string(), int: pyarrow.int64()}
    new = [pyarrow.field(name, types[each]) for name, each in shape.types.items()]
    old = (
        first.schema
        if isinstance(first, Parquet)
        else [pyarrow.field(name, pyarrow.string()) for name in own]
    )
    return (*own, *shape.types), pyarrow.schema([*old, *new])


def _job(order: Order, engine: Path, paths: list[str]) -> Job:
    """What ids of answers follow from: the same job gives the same."""
    wanted, defaults = order.wanted, order.defaults
    facts = {
        "input": paths,
        "wanted": [wanted.format, wanted.column, wanted.template, wanted.system, wanted.chat],
        "defaults": [defaults.max_tokens, defaults.seed, dict(defaults.fields)],
        "qrun": __version__,
        **model_facts(read_manifest(engine)),
    }
    return Job(facts)
