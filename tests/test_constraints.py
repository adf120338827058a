"""If these fail, `make test-oldest` cannot run, or not with the lowest versions of pyproject.toml."""

from __future__ import annotations

import re
import subprocess
import sys

import tomllib

from tests.fakes import REPOSITORY
from tests.test_imports import BLOCK

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


def test_its_tests_are_collected_where_nothing_that_converts_is_installed() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    (patterns,) = re.findall(r"^OLDEST_TESTS \?= \$\(filter-out ([^,]+),", makefile, re.MULTILINE)
    left_out = tuple(pattern.removeprefix("%") for pattern in patterns.split())
    files = [
        str(file)
        for file in sorted((REPOSITORY / "tests" / "qrun").glob("test_*.py"))
        if not file.name.endswith(left_out)
    ]
    assert len(files) > 20
    code = f"{BLOCK}\nimport pytest\nsys.exit(pytest.main(['--collect-only', '-q', *sys.argv[1:]]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "-p", "no:cacheprovider", *files],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
