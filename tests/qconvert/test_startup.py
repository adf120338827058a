"""If these fail, an export spends a tenth of its time looking for garbage, or leaves none to be found."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from qconvert.startup import imports

PROGRAM = """
import gc, sys
from qconvert.startup import imports

{before}
try:
    with imports():
        print(gc.isenabled())
        {inside}
except ZeroDivisionError:
    pass
print(gc.isenabled(), gc.get_freeze_count() > 100_000, "transformers.modeling_utils" in sys.modules)
"""


def printed(*, before: str = "", inside: str = "pass") -> list[str]:
    program = PROGRAM.format(before=before, inside=inside)
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return done.stdout.split()


@pytest.mark.export
def test_what_is_imported_is_not_looked_at_again() -> None:
    assert printed() == ["False", "True", "True", "True"]


@pytest.mark.export
def test_the_collector_works_again_after_an_error() -> None:
    assert printed(inside="1 / 0") == ["False", "True", "False", "True"]


def test_nothing_is_kept_of_a_process_that_has_torch_already(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", sys)
    frozen = gc.get_freeze_count()
    with imports():
        assert gc.isenabled()
    assert gc.get_freeze_count() == frozen
