"""schemathesis: requests made at random from our own /openapi.json, and answers compared with it."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import httpx
import pytest

pytestmark = pytest.mark.skipif(
    find_spec("schemathesis") is None, reason="needs schemathesis: run `make test-clients`"
)


@pytest.mark.timeout(600)
def test_no_request_that_the_description_allows_or_forbids_finds_a_fault(address, tmp_path):
    """No 500, no status or content that is not described, and nothing accepted that the description forbids.

    The check that everything it allows is accepted is left out: the description gives types, and not that
    top_logprobs needs logprobs, that a prompt must not be empty, or that truncation may be "disabled" only.
    """
    command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()"]
    options = ["--max-examples", "20", "--seed", "1", "--request-timeout", "60", "--no-color"]
    left_out = ["--exclude-checks", "positive_data_acceptance"]
    run = subprocess.run(
        [*command, "run", f"{address}/openapi.json", *options, *left_out],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert "13 selected / 13 total" in run.stdout
    slots = httpx.get(f"{address}/ready").json()["models"]["m"]
    assert (slots["active"], slots["queued"]) == (0, 0)
