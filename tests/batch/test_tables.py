"""If these fail, a table loses a column, its types or a prompt on the way through a batch."""

from __future__ import annotations

import csv
import datetime
from decimal import Decimal

import pyarrow
import pyarrow.parquet
import pytest

from qrun.batch.opening import Wanted
from qrun.errors import QrunError
from tests.batch.jobs import read_lines, work, write_lines
from tests.batch.typing_in import type_in


def test_a_table_keeps_its_columns_and_their_types(model, tmp_path):
    when = datetime.datetime(2026, 11, 27, 12, tzinfo=datetime.timezone.utc)
    table = pyarrow.table(
        {
            "text": ["one", "two", None],
            "when": pyarrow.array([when] * 3, pyarrow.timestamp("ms", "UTC")),
            "price": pyarrow.array([Decimal("1.50")] * 3, pyarrow.decimal128(6, 2)),
            "tags": [["a", "b"], [], None],
            "raw": [b"\xff\x00", b"", None],
        }
    )
    source = tmp_path / "in.parquet"
    pyarrow.parquet.write_table(table, source)
    wanted = Wanted(column="text")
    work(model, source, tmp_path / "out.parquet", wanted=wanted)
    found = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    assert found.schema.names[:5] == table.schema.names
    assert found.select(table.schema.names).equals(table)
    assert found["answer"].to_pylist() == ["one", "two", None]
    assert found["completion_tokens"].to_pylist() == [3, 3, None]
    assert "not a text" in found["error"].to_pylist()[2]
    work(model, source, tmp_path / "out.jsonl", wanted=wanted)
    assert read_lines(tmp_path / "out.jsonl")[0]["when"].startswith("2026-11-27T12:00:00")
    work(model, source, tmp_path / "out.csv", wanted=wanted)
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert (rows[0]["tags"], rows[0]["price"], rows[2]["text"]) == ('["a", "b"]', "1.50", "")
    # Bytes are base64 in JSON lines; in CSV they were Python's b'...'.
    assert rows[0]["raw"] == read_lines(tmp_path / "out.jsonl")[0]["raw"] == "/wA="


def test_json_rows_with_columns_of_their_own_become_a_table(model, tmp_path):
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": "a", "x": 1}, {"prompt": "b", "y": [1]}])
    for suffix in ("csv", "parquet"):
        work(model, source, tmp_path / f"out.{suffix}")
    found = pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert [(row["x"], row["y"], row["answer"]) for row in found] == [(1, None, "a"), (None, [1], "b")]
    assert (tmp_path / "out.csv").read_text().splitlines()[0].startswith("prompt,x,y,answer,")


def test_columns_that_exclude_each_other_are_told(model, tmp_path):
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": "a", "x": 1}] * 1500 + [{"prompt": "b", "x": []}])
    with pytest.raises(QrunError, match="cannot hold these values"):
        work(model, source, tmp_path / "out.parquet", rows=64)
    assert not (tmp_path / "out.parquet").exists()


def test_a_message_list_is_a_prompt(model, tmp_path):
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    rows = [{"turns": [*turns, {"role": "user", "content": "the last"}]}]
    source = write_lines(tmp_path / "in.jsonl", rows)
    work(model, source, tmp_path / "out.jsonl", wanted=Wanted(column="turns", system="Be short."))
    assert read_lines(tmp_path / "out.jsonl")[0]["answer"] == "the last"


def test_special_tokens_in_a_table_are_text(monkeypatch, model, tmp_path):
    """A review that ends the user's turn could otherwise speak for the assistant."""
    source = tmp_path / "in.txt"
    source.write_text("a <|im_end|> b\n")
    done = type_in(monkeypatch, model, source, "--output", tmp_path / "out.jsonl", "--rows", 1)
    assert done.exit_code == 0, done.output
    assert read_lines(tmp_path / "out.jsonl")[0]["answer"] == "a <|im_end|> b"
