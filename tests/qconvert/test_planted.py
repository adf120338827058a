"""If these fail, an error in an export hides behind the rounding of 8 or 4 bits, or where no logit looks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from itertools import islice
from pathlib import Path

import pytest

from tests.qconvert.planted.table import (
    ABSENT,
    COLUMNS,
    KINDS,
    MISSED,
    Subject,
    caught_by,
    family_of_column,
    make_tiny_subject,
    to_markdown,
)

PAGE = Path(__file__).resolve().parents[2] / "docs" / "planted.md"
Made = Callable[[str], Path]
SubjectOf = Callable[[str], Subject]


@pytest.fixture(scope="module")
def subject_of(tmp_path_factory: pytest.TempPathFactory) -> SubjectOf:
    """The checkpoint of a column, made when it is first asked for."""
    root = tmp_path_factory.mktemp("checkpoints")
    of_family = cache(lambda family: make_tiny_subject(root / family, family))
    return lambda column: of_family(family_of_column(column))


@pytest.fixture(scope="module")
def made(subject_of: SubjectOf, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The export of a column, made when it is first asked for; it passes its proof with nothing planted."""
    root = tmp_path_factory.mktemp("made")
    return cache(lambda column: subject_of(column).passing_export(column, root / column.replace(" ", "-")))


class Doomed(Subject):
    """A checkpoint whose exports all fail."""

    def failures(self, folder: Path) -> Iterator[tuple[str, str]]:
        yield "logits on every path", str(folder)


def documented() -> dict[str, dict[str, str]]:
    """The table of docs/planted.md: for every kind and column what caught it."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.read_text(encoding="utf-8").splitlines()
        if re.match(r"\| ", line)
    ]
    (_, *columns), *rest = rows
    return {kind: dict(zip(columns, cells, strict=True)) for kind, *cells in rest}


def test_the_documented_table_has_every_kind_and_column_and_nothing_was_missed() -> None:
    table = documented()
    assert list(table) == list(KINDS)
    assert to_markdown(table) in PAGE.read_text(encoding="utf-8")
    for kind, found in table.items():
        assert list(found) == list(COLUMNS)
        assert not any(caught.startswith(MISSED) for caught in found.values()), kind
        assert set(found.values()) != {ABSENT}, f"{kind} has no place anywhere"


@pytest.mark.planted
@pytest.mark.parametrize("column", COLUMNS)
def test_an_export_with_nothing_planted_passes(made: Made, column: str) -> None:
    made(column)


def test_nothing_is_planted_into_an_export_that_fails_without(subject_of: SubjectOf, tmp_path: Path) -> None:
    subject = Doomed(subject_of("int8").checkpoint, subject_of("int8").reference)
    with pytest.raises(AssertionError, match="int8, nothing planted"):
        subject.passing_export("int8", tmp_path / "m")


def _one_column(kind: str) -> str:
    """A column in which the kind has a place, another one for the next kind."""
    columns = [column for column, caught in documented()[kind].items() if caught != ABSENT]
    return next(islice(columns, list(KINDS).index(kind) % len(columns), None))


# Every tenth kind; all of them in every column take a quarter of an hour (`make test-planted`).
@pytest.mark.parametrize("kind", list(KINDS)[::10])
def test_a_planted_error_is_caught(subject_of: SubjectOf, made: Made, tmp_path: Path, kind: str) -> None:
    column = _one_column(kind)
    assert caught_by(subject_of(column), made(column), kind, tmp_path / "m") == documented()[kind][column]


@pytest.mark.planted
@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_error_is_caught_in_every_export(
    subject_of: SubjectOf, made: Made, tmp_path: Path, kind: str, column: str
) -> None:
    assert caught_by(subject_of(column), made(column), kind, tmp_path / "m") == documented()[kind][column]
