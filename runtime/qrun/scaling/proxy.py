"""What listens in front of a deployment: Ray Serve's proxy, which reads requests as ``qrun serve`` does."""

from __future__ import annotations

import os
from typing import Any

# By this variable Ray Serve learns what to call in the process of each proxy, before it listens.
_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"


def prepared() -> list[Any]:
    """Take our server's parser of HTTP in this process; gives no middlewares.

    Beside Ray httptools is installed, which uvicorn takes by default: a head of any size was read, half of
    one was waited for without end, and requests without a Host were answered.
    """
    from qrun.serve.server import read_everywhere

    read_everywhere()
    return []


def variables() -> dict[str, str]:
    """The environment in which proxies find ``prepared``, or what the operator has named in its place."""
    return {_VARIABLE: os.environ.get(_VARIABLE, f"{__name__}:{prepared.__name__}")}
