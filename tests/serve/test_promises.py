"""The list of promises names tests that there are."""

from __future__ import annotations

import re

from tests.fakes import REPOSITORY


def test_every_promise_has_its_test():
    lines = (REPOSITORY / "tests" / "serve" / "README.md").read_text().splitlines()
    promises = [line for line in lines if line.startswith("| ") and not line.startswith("| **")][1:]
    assert len(promises) > 60
    for line in promises:
        named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", line)
        assert named, line
        for file, test in named:
            assert f"def {test}(" in (REPOSITORY / file).read_text(), f"{file}::{test}"
