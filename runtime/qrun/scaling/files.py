"""Ray Data's reading and writing, with the readers and the writers of ``qrun.batch``.

A row travels as one pickled value: whatever types a file has, a worker gets the row that it would get on one
machine, with its number.
"""

from __future__ import annotations

import pickle
import shutil
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow
import pyarrow.fs
import pyarrow.parquet
from ray.data.block import BlockAccessor
from ray.data.datasource import BlockBasedFileDatasink, FileBasedDatasource

from qrun.batch.opening import open_source
from qrun.batch.outputs import line_writer
from qrun.batch.sources import Format, Row, Source
from qrun.errors import QrunError

_ROWS = 256  # of a block


def expand(pattern: str) -> list[str]:
    """The files that a path, a folder or a pattern means, on this machine or on a store such as s3://.

    Raises:
        QrunError: there are none.
    """
    system, path = _system(pattern)
    try:
        if any(letter in path for letter in "*?["):
            fixed = path[: min(path.find(letter) for letter in "*?[" if letter in path)].rpartition("/")[0]
            found = system.get_file_info(pyarrow.fs.FileSelector(fixed or "/", recursive=True))
            names = [each.path for each in found if each.is_file and fnmatch(each.path, path)]
        else:
            info = system.get_file_info(path)
            names = [path] if info.is_file else []
            if info.type == pyarrow.fs.FileType.Directory:
                found = system.get_file_info(pyarrow.fs.FileSelector(path))
                names = [
                    each.path for each in found if each.is_file and not each.base_name.startswith((".", "_"))
                ]
    except (OSError, pyarrow.ArrowException) as error:
        raise QrunError(f"the input cannot be listed: {error}", where=pattern) from None
    if not names:
        raise QrunError("there is no such file", where=pattern, hint="patterns are put in quotation marks")
    scheme = pattern.split("://", maxsplit=1)[0] + "://" if "://" in pattern else ""
    return sorted(f"{scheme}{name}" for name in names)


def fetched(path: str, folder: Path) -> Source:
    """The rows of a file that may lie on a store: it is copied into ``folder``.

    Raises:
        QrunError: see ``open_source``.
    """
    system, inner = _system(path)
    try:
        with system.open_input_stream(inner, compression=None) as file:
            return _opened(file, path, folder, None)
    except (OSError, pyarrow.ArrowException) as error:
        raise QrunError(f"the input cannot be read: {error}", where=path) from None


def _system(path: str) -> tuple[Any, str]:
    if "://" in path:
        try:
            return pyarrow.fs.FileSystem.from_uri(path)  # type: ignore[no-any-return]
        except (ValueError, OSError, pyarrow.ArrowException) as error:
            raise QrunError(f"this is no address of files: {error}", where=path) from None
    return pyarrow.fs.LocalFileSystem(), str(Path(path).expanduser().absolute())


def _opened(file: Any, path: str, folder: Path, kind: Format | None) -> Source:
    name = PurePosixPath(path).name
    here = folder / f"{sha256(path.encode()).hexdigest()[:16]}-{name}"
    with here.open("wb") as target:
        shutil.copyfileobj(file, target)
    return open_source(here, kind, name=Path(name))


def key_of(path: str, number: int) -> int:
    """A row's own number among all rows of all files, below 2 to the 62."""
    return int.from_bytes(sha256(f"{path}\n{number}".encode()).digest()[:8], "big") >> 2


class Rows(FileBasedDatasource):  # type: ignore[misc]
    """The rows of many files; each file is read by one task.

    Args:
        paths: of the files.
        kind: their format; by default what each one's name and first bytes say.
        columns: those of the output, whose names tables must have; None where each row has its own.
        taken: names of the answer's columns, which no row may have.
    """

    def __init__(
        self,
        paths: Sequence[str],
        kind: Format | None,
        columns: Sequence[str] | None = None,
        taken: Collection[str] = (),
    ) -> None:
        super().__init__(list(paths), open_stream_args={"compression": None})
        self._kind, self._columns, self._taken = kind, columns, taken

    def _read_stream(self, f: Any, path: str) -> Iterator[Any]:
        with tempfile.TemporaryDirectory(prefix="qrun-input-") as folder:
            block: list[Row] = []
            source = _opened(f, path, Path(folder), self._kind)
            self._check(source.columns or (), path)
            for row in source.rows():
                check_taken(row.values, self._taken, path)
                block.append(row)
                if len(block) == _ROWS:
                    yield _table(path, block)
                    block = []
            if block:
                yield _table(path, block)

    def _check(self, columns: Sequence[str], path: str) -> None:
        """Refuse a table whose columns would be left out of the output, or be missing in it.

        Raises:
            QrunError: names one.
        """
        if self._columns is None or set(columns) == set(self._columns):
            return
        odd = sorted(set(columns) ^ set(self._columns))[0]
        which = "is not in the first file" if odd in columns else "is missing"
        raise QrunError(
            f"the files have different columns: {odd!r} {which}",
            where=path,
            hint="give files of the same columns, or JSON lines",
        )


def check_taken(columns: Collection[str], taken: Collection[str], path: str | Path) -> None:
    """Refuse a column that an answer's would overwrite.

    Raises:
        QrunError: names it.
    """
    found = next((name for name in taken if name in columns), None)
    if found is not None:
        raise QrunError(
            f"the input has a column {found!r}, which is the name of one of the answer's",
            where=path,
            hint="give --prefix, such as --prefix model_",
        )


def _table(path: str, rows: Sequence[Row]) -> Any:
    return pyarrow.table(
        {
            "key": pyarrow.array([key_of(path, row.number) for row in rows], pyarrow.int64()),
            "file": pyarrow.array([path] * len(rows), pyarrow.string()),
            "row": pyarrow.array([pickle.dumps(row) for row in rows], pyarrow.binary()),
        }
    )


@dataclass
class Tally:
    """What some rows come to: the sum tells whether they are the same rows, each once.

    Attributes:
        rows: how many.
        sum: of their keys.
        errors: by kind.
        prompt_tokens, completion_tokens: of all.
    """

    rows: int = 0
    sum: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, other: Tally) -> None:
        """Those of both."""
        self.rows += other.rows
        self.sum += other.sum
        self.errors += other.errors
        self.prompt_tokens += other.prompt_tokens
        self.completion_tokens += other.completion_tokens


def tally(table: Any) -> Tally:
    """Of a table of rows, or of answered ones."""
    found = Tally(table.num_rows, sum(table["key"].to_pylist()))
    if "error" in table.column_names:
        found.errors = Counter(each for each in table["error"].to_pylist() if each)
        found.prompt_tokens = sum(table["prompt_tokens"].to_pylist())
        found.completion_tokens = sum(table["completion_tokens"].to_pylist())
    return found


class Answers(BlockBasedFileDatasink):  # type: ignore[misc]
    """Writes answered rows into files of a folder; a task that is tried again writes the same file again.

    Args:
        path: the folder.
        kind: of the files.
        columns: of CSV files.
        schema: of Parquet files.
        rows: of a file, but for the last ones.
    """

    def __init__(self, path: str, kind: Format, columns: Sequence[str], schema: Any, rows: int) -> None:
        super().__init__(path, file_format=kind, min_rows_per_file=rows)
        self._kind, self._columns, self._schema = kind, columns, schema
        self.written = Tally()

    def write(self, blocks: Iterable[Any], ctx: Any) -> Any:
        tables = [BlockAccessor.for_block(block).to_arrow() for block in blocks]
        super().write(tables, ctx)
        found = Tally()
        for table in tables:
            if table.num_rows:
                found.add(tally(table))
        return found

    def write_block_to_file(self, block: Any, file: Any) -> None:
        packed = block.to_arrow()["row"].to_pylist()
        rows: list[Mapping[str, Any]] = [pickle.loads(each) for each in packed]  # noqa: S301 (our own)
        if self._kind == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=self._schema), file)
            return
        head, line = line_writer(self._kind, self._columns)
        file.write(head + b"".join(map(line, rows)))

    def on_write_complete(self, write_result: Any) -> None:
        for each in write_result.write_returns:
            self.written.add(each)
