"""If this fails, `make test-oldest` no longer installs the lowest versions that pyproject.toml allows."""

from __future__ import annotations

import re

import tomllib

from tests.fakes import REPOSITORY

EXTRAS = ("cpu", "grammar")


def test_the_oldest_versions_are_those_of_the_bounds() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = dict(
        re.fullmatch(r"([\w-]+)>=([\d.]+)", each).groups()
        for extra in (project["dependencies"], *(project["optional-dependencies"][name] for name in EXTRAS))
        for each in extra
    )
    lines = (REPOSITORY / "constraints-oldest.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert pinned.keys() == wanted.keys()
    for name, bound in wanted.items():
        assert re.fullmatch(rf"{re.escape(bound)}(\.0)*", pinned[name]), f"{name}: {bound}, {pinned[name]}"
