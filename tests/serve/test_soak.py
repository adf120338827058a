"""The soak in short: some seconds, one kill. ``make soak`` runs ten minutes of it."""

from __future__ import annotations

import pytest

from tests.serve.soak import soak

pytestmark = pytest.mark.slow


def test_nothing_is_left_of_clients_that_behave_badly(tiny_export):
    told = soak(tiny_export, seconds=12, kills=1)
    for doing in ("chat", "stream_slowly", "call", "score"):
        assert any(f"{doing}: answered" in line for line in told)
    assert any("broken off" in line for line in told)
