"""A server for clients that others wrote (`make test-clients`); without its client a test is skipped."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    """Its model calls the tools that it is given, else echoes."""
    # Here, so that a machine without the server's libraries or Qwen's template can collect these tests.
    from tests.clients.assistant import assistant
    from tests.serve.serving import serving

    with serving({"m": assistant()}) as found:
        yield found
