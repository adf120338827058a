"""What all handlers share: models, keys, limits, and what is noted of a request for its log line."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from time import time
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from qrun.engine import Engine
from qrun.serve.errors import ApiError
from qrun.serve.models import Models, Served


@dataclass
class ServerState:
    """The server's own state.

    Attributes:
        models: by the name that clients use.
        keys: API keys; none at all lets everybody in.
        names: hosts that clients may call it beside localhost and addresses, in lower case.
        origins: whose pages may ask it beside its own.
        most_bytes: of a request's body.
        max_tokens: of an answer, as the engines have it; None for no limit.
        max_seconds: for a request's body, and as the engines have it for its answer; None for no limit.
        log_text: whether prompts and answers stand in the log.
        part_seconds: for the next part of a request's body.
        ping_seconds: a stream that is silent for so long sends a comment.
        draining: whether no new requests are taken.
        started: seconds since 1970.
    """

    models: Models
    keys: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    most_bytes: int = 8 << 20
    max_tokens: int | None = None
    max_seconds: float | None = None
    log_text: bool = False
    part_seconds: float = 30.0
    ping_seconds: float = 10.0
    draining: bool = False
    started: int = field(default_factory=lambda: int(time()))

    def model(self, name: str | None) -> Served:
        """The model of a name; without a name, the only one.

        Raises:
            ApiError: 404, with the names that there are.
        """
        if name is None and len(self.models) == 1:
            return next(iter(self.models.values()))
        if name is None:
            raise ApiError(400, "model is missing", param="model")
        if name not in self.models:
            text = f"there is no model {name!r}; there are: {', '.join(self.models)}"
            raise ApiError(404, text, param="model", code="model_not_found")
        return self.models[name]

    def admit(self, key: str) -> str:
        """Who asks: a name for the key, "" where none are needed.

        Raises:
            ApiError: 401.
        """
        if not self.keys:
            return ""
        # Every key is compared, so that the time that this takes does not tell which of them was close.
        right = [hmac.compare_digest(key.encode(), each.encode()) for each in self.keys]
        if not any(right):
            text = "a valid API key is needed: Authorization: Bearer KEY, or x-api-key: KEY"
            raise ApiError(401, text, code="invalid_api_key")
        return sha256(key.encode()).hexdigest()[:12]


async def engine_of(request: Request, name: str | None) -> Engine:
    """The engine of the model that a request names, which stays open until the request has ended.

    Raises:
        ApiError: 404, see ``ServerState.model``; 503, see ``Models.use``.
    """
    state: ServerState = request.app.state.server
    served = state.model(name)
    engine = await state.models.use(served.name)
    request.scope.setdefault("qrun.uses", []).append(served)
    return engine


def client_of(request: Request) -> str:
    """Who asks, for the queue: by key, else by address."""
    found: str = request.scope.get("qrun.client") or (request.client.host if request.client else "")
    return found


async def read_body(request: Request) -> bytes:
    """The body, bounded in size and time.

    Raises:
        ApiError: 413; 408; or 400 where it ends too early.
    """
    state: ServerState = request.app.state.server
    try:
        return await asyncio.wait_for(_whole_body(request, state), state.max_seconds)
    except asyncio.TimeoutError:
        text = f"the body did not come within {state.max_seconds:g} seconds"
        raise ApiError(408, text, code="timeout") from None


async def _whole_body(request: Request, state: ServerState) -> bytes:
    coming, parts, size = aiter(request.stream()), list[bytes](), 0
    while True:
        try:
            part = await asyncio.wait_for(anext(coming), state.part_seconds)
        except StopAsyncIteration:
            return b"".join(parts)
        except asyncio.TimeoutError:
            text = f"nothing more of the body has come for {state.part_seconds:g} seconds"
            raise ApiError(408, text, code="timeout") from None
        size += len(part)
        if size > state.most_bytes:
            raise ApiError(413, f"the body is larger than {state.most_bytes:,} bytes", code="too_large")
        parts.append(part)


def note(request: Request, **facts: Any) -> None:
    """Add to the request's log line."""
    request.scope.setdefault("qrun.facts", {}).update(facts)


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """An answer in JSON."""
    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")
