"""The routes, and what surrounds each request: who may ask, how errors look, one line in the log."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from time import perf_counter
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qrun import __version__
from qrun.chat import template_of
from qrun.errors import QrunError
from qrun.serve import guard, openapi, pages
from qrun.serve.dialects import CHAT, COMPLETION, MESSAGES, RESPONSES
from qrun.serve.errors import ApiError, from_qrun
from qrun.serve.fields import DetokenizeRequest, TemplateRequest, TokenizeRequest, decode, texts_only
from qrun.serve.handlers import complete
from qrun.serve.messages import CountRequest, prompt_of
from qrun.serve.metrics import Metrics
from qrun.serve.models import Served
from qrun.serve.state import ServerState, engine_of, json_response, note, read_body
from qrun.serve.streams import ClientGoneError
from qrun.serve.tools import check_variables

log = logging.getLogger("qrun.serve")
# Paths that need no key: a process manager asks them, or a browser opens them before a key is typed.
_OPEN_PATHS = frozenset(("/health", "/ready", "/openapi.json", *pages.FILES))
_GONE = 499  # nginx's status for a client that went away; it appears in the log only


def create_app(state: ServerState) -> ASGIApp:
    """The ASGI application."""
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", _chat, methods=["POST"]),
            Route("/v1/completions", _completion, methods=["POST"]),
            Route("/v1/responses", _responses, methods=["POST"]),
            Route("/v1/messages", _messages, methods=["POST"]),
            Route("/v1/messages/count_tokens", _count_tokens, methods=["POST"]),
            Route("/metrics", _metrics),
            Route("/v1/models", _models),
            Route("/v1/models/{name:path}", _model),
            Route("/tokenize", _tokenize, methods=["POST"]),
            Route("/detokenize", _detokenize, methods=["POST"]),
            Route("/apply-template", _apply_template, methods=["POST"]),
            Route("/health", _health),
            Route("/ready", _ready),
            Route("/openapi.json", _openapi),
            *pages.routes(),
        ],
        exception_handlers={
            ApiError: _api_error,
            QrunError: _qrun_error,
            HTTPException: _http_error,
            ClientGoneError: _gone,
            ClientDisconnect: _gone,
            Exception: _fault,
        },
    )
    metrics = app.state.metrics = Metrics(state.models)
    app.state.server = state
    limits = openapi.Limits(state.max_tokens, state.max_seconds)
    app.state.openapi = openapi.document(app.routes, __version__, list(state.models), limits)
    whole: ASGIApp = Surroundings(app, state, metrics)
    if state.origins:
        whole = CORSMiddleware(
            whole,
            allow_origins=state.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )
    return whole


class Surroundings:
    """Origins, keys, and the log: one line of JSON for each request, without its text."""

    def __init__(self, app: ASGIApp, state: ServerState, metrics: Metrics) -> None:
        self._app, self._state, self._metrics = app, state, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, sent = perf_counter(), {"status": _GONE}

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                sent["status"] = message["status"]
                message["headers"] = [*message.get("headers", ()), *guard.HEADERS]
            await send(message)

        try:
            guard.check(scope, self._state.names, self._state.origins)
            if scope["path"] not in _OPEN_PATHS:
                scope["qrun.client"] = self._state.admit(_key(scope))
                if self._state.draining:
                    raise ApiError(503, "the server is closing: it takes no more requests", code="closing")
        except ApiError as error:
            await json_response(error.body(scope["path"]), error.status, error.headers)(
                scope, receive, watched
            )
        else:
            await self._app(scope, receive, watched)
        finally:
            for served in scope.get("qrun.uses", ()):
                self._state.models.release(served)
            facts = scope.get("qrun.facts", {})
            # The route and not the path: clients could invent paths, and so labels, without end.
            route = getattr(scope.get("route"), "path", "none")
            self._metrics.request(route, sent["status"], facts)
            line = {
                "method": scope["method"],
                "path": scope["path"],
                "status": sent["status"],
                "ms": round(1000 * (perf_counter() - started), 1),
                **facts,
            }
            log.info(json.dumps(line, ensure_ascii=False))


def _key(scope: Scope) -> str:
    """The API key of a request, as OpenAI's clients or Anthropic's send it; "" where there is none."""
    headers: dict[bytes, bytes] = dict(scope["headers"])
    scheme, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
    if scheme.lower() == "bearer":
        return key.strip()
    return headers.get(b"x-api-key", b"").decode("latin-1").strip()


async def _chat(request: Request) -> Response:
    return await complete(request, CHAT)


async def _completion(request: Request) -> Response:
    return await complete(request, COMPLETION)


async def _responses(request: Request) -> Response:
    return await complete(request, RESPONSES)


async def _messages(request: Request) -> Response:
    return await complete(request, MESSAGES)


async def _count_tokens(request: Request) -> Response:
    fields = decode(await read_body(request), CountRequest)
    engine = await engine_of(request, fields.model)
    prompt, _ = await asyncio.to_thread(prompt_of, engine, fields)
    return json_response({"input_tokens": len(prompt)})


async def _metrics(request: Request) -> Response:
    return Response(request.app.state.metrics.text(), media_type="text/plain; version=0.0.4")


async def _models(request: Request) -> Response:
    state: ServerState = request.app.state.server
    data = [_described(state, served) for served in state.models.values()]
    return json_response({"object": "list", "data": data})


async def _model(request: Request) -> Response:
    state: ServerState = request.app.state.server
    return json_response(_described(state, state.model(request.path_params["name"])))


def _described(state: ServerState, served: Served) -> dict[str, Any]:
    manifest = served.source.manifest
    return {
        "id": served.name,
        "object": "model",
        "created": state.started,
        "owned_by": "qrun",
        "context_length": manifest.model.context_length,
        "precision": manifest.precision,
        "slots": served.source.slots,
        "state": served.state,
    }


async def _tokenize(request: Request) -> Response:
    fields = decode(await read_body(request), TokenizeRequest)
    engine = await engine_of(request, fields.model)
    encode = engine.model.tokenizer.encode
    # In a thread, as all work on texts: a long one would hold up everybody's streams.
    ids = await asyncio.to_thread(encode, fields.content, add_special_tokens=fields.add_special)
    return json_response({"tokens": ids})


async def _detokenize(request: Request) -> Response:
    fields = decode(await read_body(request), DetokenizeRequest)
    model = (await engine_of(request, fields.model)).model
    size = model.manifest.model.vocab_size
    bad = next((each for each in fields.tokens if not 0 <= each < size), None)
    if bad is not None:
        raise ApiError(400, f"token id {bad} is outside the vocabulary of {size}", param="tokens")
    text = await asyncio.to_thread(model.tokenizer.decode, fields.tokens, skip_special_tokens=False)
    return json_response({"content": text})


async def _apply_template(request: Request) -> Response:
    fields = decode(await read_body(request), TemplateRequest)
    model = (await engine_of(request, fields.model)).model
    variables = fields.chat_template_kwargs or {}
    check_variables(model, variables)
    template, messages = template_of(model).given(variables), texts_only(fields.messages)
    return json_response({"prompt": await asyncio.to_thread(template.render, messages)})


async def _health(request: Request) -> Response:
    return json_response({"status": "ok"})


async def _ready(request: Request) -> Response:
    state: ServerState = request.app.state.server
    if state.draining:
        raise ApiError(503, "the server is closing", code="closing")
    if not state.models.ready:
        waited = ", ".join(name for name, served in state.models.items() if served.state != "loaded")
        raise ApiError(503, f"models are being loaded: {waited}", code="model_loading")
    return json_response(
        {"status": "ready", "models": {name: _load(each) for name, each in state.models.items()}}
    )


def _load(served: Served) -> dict[str, int]:
    engine = served.engine
    active, queued = (0, 0) if engine is None else (engine.active, engine.queued)
    return {"slots": served.source.slots, "active": active, "queued": queued}


async def _openapi(request: Request) -> Response:
    return json_response(request.app.state.openapi)


_Handler = Callable[[Request, Exception], Awaitable[Response]]


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    note(request, error=error.message)
    return json_response(error.body(request.url.path), error.status, error.headers)


async def _qrun_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, QrunError)
    return await _api_error(request, from_qrun(error))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = {404: f"there is no {request.url.path}", 405: f"{request.method} is not allowed here"}
    refusal = ApiError(error.status_code, text.get(error.status_code, str(error.detail)))
    response = await _api_error(request, refusal)
    response.headers.update(error.headers or {})
    return response


async def _gone(request: Request, error: Exception) -> Response:
    note(request, error="the client went away")
    return Response(status_code=_GONE)


async def _fault(request: Request, error: Exception) -> Response:
    """A fault of ours: the traceback goes into the log, and the client is told nothing of it."""
    return await _api_error(request, ApiError(500, "the server has a fault; its log says more"))
