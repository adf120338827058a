"""If one of these fails, README promises what no test runs."""

from __future__ import annotations

import re

from tests.fakes import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PAGE = (REPOSITORY / "docs" / "supported.md").read_text(encoding="utf-8")
PARTS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))


def rows_of_readme() -> dict[str, str]:
    table = README.partition("## What is supported")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+) \| (.+) \|$", table, re.MULTILINE)
    return {first.strip(): rest for first, rest in rows if "---" not in first}


def test_every_row_and_every_name_in_it_has_its_tests() -> None:
    rows = rows_of_readme()
    assert len(rows) > 6
    assert list(PARTS) == list(rows)
    for name, row in rows.items():
        plain = re.sub(r"\[[^]]*\]\([^)]*\)", "", row)
        assert not [each for each in re.findall(r"`([^`]+)`", plain) if each not in PARTS[name]], name


def test_every_test_that_is_named_is_there() -> None:
    lines = [line for line in PAGE.splitlines() if line.startswith("| ") and line != "| what | test |"]
    assert len(lines) > 30
    for line in lines:
        named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", line)
        assert named, line
        for file, test in named:
            assert f"def {test}(" in (REPOSITORY / file).read_text(encoding="utf-8"), f"{file}::{test}"
