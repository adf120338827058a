"""If this fails, docs/quantised.md shows other figures than those that were measured."""

from __future__ import annotations

import json

import pytest

from benchmarks.formats_table import ROWS, table
from tests.fakes import REPOSITORY

RESULTS = REPOSITORY / "benchmarks" / "results"


@pytest.mark.parametrize("name", ["formats-4-layers.json", "formats.json"])
def test_the_page_holds_the_table_of_what_was_measured(name: str) -> None:
    """``make formats-table`` measures, and prints the table."""
    measured = json.loads((RESULTS / name).read_text())
    assert measured
    assert set(measured) == set(ROWS)
    assert all(row["passed"] for row in measured.values())
    assert table(measured) in (REPOSITORY / "docs" / "quantised.md").read_text(encoding="utf-8")
