"""What tests of both packages share: the one real model, made once and kept between runs."""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def sample_checkpoint() -> Path:
    """The sample checkpoint, read-only for tests; ``QCONVERT_TEST_CACHE`` says where it is kept.

    Made by the product's own command through the package registry (which appears by one rename, so two
    test runs at once do no harm).
    """
    from qconvert.errors import QconvertError
    from qconvert.sample import make_sample

    cache = Path(os.environ.get("QCONVERT_TEST_CACHE", REPOSITORY / ".cache" / "tests"))
    folder = cache / "sample-model"
    if not folder.is_dir():
        try:
            make_sample(folder)
        except QconvertError:
            if not folder.is_dir():  # else another run made it meanwhile
                raise
    return folder


@pytest.fixture
def even_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step of one answer takes 10 ms by the scheduler's clock, whatever else the machine does."""
    clock = count()
    monkeypatch.setattr("qrun.decoding.scheduler.perf_counter", lambda: 0.01 * next(clock))
