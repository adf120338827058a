"""Server-sent events as bytes.

Source: the WHATWG HTML standard, section "Server-sent events".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"


def event(content: Mapping[str, Any], name: str | None = None) -> bytes:
    """One event with a JSON object."""
    head = b"" if name is None else f"event: {name}\n".encode()
    return head + b"data: " + msgspec.json.encode(content) + b"\n\n"
