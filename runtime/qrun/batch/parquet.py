"""Parquet files in and out, through pyarrow, which only they need."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qrun.batch.sources import Row, check_names
from qrun.errors import QrunError

_ROWS = 1024  # that are held at a time


def need_pyarrow(path: Path) -> None:
    """Raises:
    QrunError: pyarrow is not installed; says what to install.
    """
    if find_spec("pyarrow") is None:
        raise QrunError(
            "a Parquet file needs pyarrow, which is not installed",
            where=path,
            hint="pip install 'qconvert[batch]', or give JSON lines or CSV",
        )


class Parquet:
    """The rows of one Parquet file; a row's values are Python's.

    Raises:
        QrunError: pyarrow is not installed, this is no Parquet file, or two columns have one name.
    """

    def __init__(self, path: Path) -> None:
        need_pyarrow(path)
        import pyarrow
        import pyarrow.parquet

        self.path = path
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                self.schema = file.schema_arrow
        except (pyarrow.ArrowException, OSError) as error:
            raise QrunError(f"this is no Parquet file: {_first_line(error)}", where=path) from None
        self.columns: tuple[str, ...] = tuple(self.schema.names)
        check_names(self.columns, path)

    def rows(self) -> Iterator[Row]:
        number = 0
        for batch in self.batches():
            try:
                found = batch.to_pylist()
            except (ValueError, OverflowError) as error:  # a time that Python has no type for
                raise QrunError(f"a value cannot be read: {_first_line(error)}", where=self.path) from None
            for values in found:
                number += 1
                yield Row(number, values)

    def batches(self) -> Iterator[Any]:
        """Record batches of some rows, with the types of the file."""
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(self.path) as file:
                yield from file.iter_batches(_ROWS)
        except (pyarrow.ArrowException, OSError) as error:
            raise QrunError(f"the file cannot be read: {_first_line(error)}", where=self.path) from None


def write_rows(path: Path | None, rows: Iterable[Mapping[str, Any]], columns: tuple[str, ...]) -> None:
    """Write rows of texts, numbers and the like; a column's type is that of its values.

    Args:
        path: what to write; None to see only whether it could be written.
        rows: in order.
        columns: those to write.

    Raises:
        QrunError: a column holds values of types that exclude each other, or that Parquet has no type for.
    """
    import pyarrow
    import pyarrow.parquet

    # The types are known when all rows have been seen; until then the rows wait as Arrow's tables, packed.
    tables: list[Any] = []
    try:
        for block in _blocks(rows):
            arrays = [_array(name, [row.get(name) for row in block]) for name in columns]
            tables.append(pyarrow.table(arrays, names=list(columns)))
        schema = pyarrow.unify_schemas([each.schema for each in tables], promote_options="permissive")
        with pyarrow.parquet.ParquetWriter(path or pyarrow.MockOutputStream(), schema) as writer:
            for table in tables:
                writer.write_table(table.cast(schema))
    except pyarrow.ArrowException as error:
        raise _unwritable(_first_line(error)) from None


def _array(name: str, values: list[Any]) -> Any:
    import pyarrow

    try:
        return pyarrow.array(values)
    except (pyarrow.ArrowException, OverflowError) as error:
        raise _unwritable(f"column {name!r}: {_first_line(error)}") from None


def _unwritable(what: str) -> QrunError:
    return QrunError(
        f"a Parquet file cannot hold these values: {what}", hint="give an --output that ends in .jsonl"
    )


def write_beside(path: Path, source: Parquet, added: Iterator[Mapping[str, Any]], types: Any) -> None:
    """Write the rows of a Parquet file in its own types, with more columns.

    Args:
        path: what to write.
        source: the rows.
        added: the new columns' values, one for each row.
        types: the new columns' names, with ``str`` or ``int``.
    """
    import pyarrow
    import pyarrow.parquet

    kinds = {str: pyarrow.string(), int: pyarrow.int64()}
    new = [pyarrow.field(name, kinds[kind]) for name, kind in types.items()]
    schema = pyarrow.schema([*source.schema, *new])
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for batch in source.batches():
            values = [next(added) for _ in range(batch.num_rows)]
            arrays = [pyarrow.array([row.get(each.name) for row in values], each.type) for each in new]
            writer.write_batch(pyarrow.record_batch([*batch.columns, *arrays], schema=schema))


def _blocks(rows: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    block: list[Mapping[str, Any]] = []
    for row in rows:
        block.append(row)
        if len(block) == _ROWS:
            yield block
            block = []
    if block:
        yield block


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
