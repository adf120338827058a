"""If this fails, a test of the server is not asked of Ray Serve, and no one is told."""

from __future__ import annotations

import pytest

from tests.ray import apart


def test_each_reason_belongs_to_a_file_or_test_that_there_is(monkeypatch):
    monkeypatch.setitem(apart.APART, "tests/serve/test_gone.py", "why")
    monkeypatch.setitem(apart.APART, "tests/serve/test_tools.py::test_gone", "why")
    here = {name for name in apart.APART if "::" in name and not name.endswith("gone")}
    assert apart.stale(here) == ["tests/serve/test_gone.py", "tests/serve/test_tools.py::test_gone"]
    assert apart.stale(()) == ["tests/serve/test_gone.py"], "of files that are not collected nothing is known"


@pytest.mark.parametrize("name", apart.APART)
def test_each_reason_is_told(name):
    assert len(apart.APART[name].split()) > 2
