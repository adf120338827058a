"""Models that cost nothing for batches, and what a batch is made of."""

from __future__ import annotations

import pytest

from tests.batch.fakes import echo_model
from tests.fakes import tiny_tokenizer
from tests.qrun.conftest import exporter, tiny_export  # noqa: F401


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def model(tokenizer):
    return echo_model(tokenizer)
