"""The OpenAPI document, from the routes that there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.routing import BaseRoute, Route

from qrun.serve.fields import (
    ROLES,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Harmless,
    TemplateRequest,
    TokenizeRequest,
)
from qrun.serve.messages import CountRequest, MessagesRequest
from qrun.serve.responses import ResponsesRequest


@dataclass(frozen=True)
class Described:
    """What the document says of a route.

    Attributes:
        summary: one line.
        body: the fields of the request, None for none.
        media: of the answer, beside that of streams.
        open: whether no key is needed.
    """

    summary: str
    body: type[msgspec.Struct] | None = None
    media: str = "application/json"
    open: bool = False


DESCRIBED = {
    "/v1/chat/completions": Described("The next message of a conversation", ChatRequest),
    "/v1/completions": Described("How a text goes on", CompletionRequest),
    "/v1/responses": Described("OpenAI's newer API", ResponsesRequest),
    "/v1/messages": Described("Anthropic's API", MessagesRequest),
    "/v1/messages/count_tokens": Described("How many tokens a conversation has", CountRequest),
    "/metrics": Described("Figures for Prometheus", media="text/plain"),
    "/v1/models": Described("The models"),
    "/v1/models/{name}": Described("One model"),
    "/tokenize": Described("Text to token ids", TokenizeRequest),
    "/detokenize": Described("Token ids to text", DetokenizeRequest),
    "/apply-template": Described("Messages to the prompt that the model reads", TemplateRequest),
    "/health": Described("The process is alive", open=True),
    "/ready": Described("It takes requests", open=True),
    "/openapi.json": Described("This document", open=True),
}


# What the types of a request's fields do not say.
_NARROWER: dict[str, dict[str, Any]] = {
    "messages": {
        "minItems": 1,
        "items": {"type": "object", "required": ["role"], "properties": {"role": {"enum": list(ROLES)}}},
    },
    "tokens": {"items": {"type": "integer", "minimum": 0, "maximum": (1 << 31) - 1}},
}


@dataclass(frozen=True)
class Limits:
    """What one request may take; None where nothing is said.

    Attributes:
        tokens: of an answer.
        seconds: for its body, and for its answer.
    """

    tokens: int | None = None
    seconds: float | None = None

    def told(self) -> str:
        """For people."""
        found = []
        if self.tokens is not None:
            found.append(f"An answer has at most {self.tokens:,} tokens.")
        if self.seconds is not None:
            found.append(
                f"A request has {self.seconds:g} seconds, with waiting and reading: then its answer ends "
                'as at max_tokens (finish_reason "length"; of messages stop_reason "max_tokens"; of '
                'responses "incomplete"). One that was not begun is refused with 504, a late body with 408.'
            )
        return " ".join(found) or "Nothing bounds the time of a request, and only the context its answer."


_LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


def document(
    routes: Sequence[BaseRoute], version: str, models: Sequence[str], limits: Limits = Limits()
) -> dict[str, Any]:
    """OpenAPI 3.1.

    Args:
        routes: of the application.
        version: of qrun.
        models: the names of those that there are.
        limits: of a request.

    Raises:
        KeyError: a route is not in ``DESCRIBED``.
    """
    bodies = sorted({each.body for each in DESCRIBED.values() if each.body}, key=lambda each: each.__name__)
    _, schemas = msgspec.json.schema_components(bodies, ref_template="#/components/schemas/{name}")
    for properties in (each.get("properties", {}) for each in schemas.values()):
        for name in filter(properties.__contains__, Harmless.__struct_fields__):  # these are listed last
            properties[name] = {**properties.pop(name), "description": "Accepted, and changes nothing."}
        for name in filter(properties.__contains__, _NARROWER):
            properties[name] = {**properties[name], **_NARROWER[name]}
        for name in filter(properties.__contains__, _LENGTHS if limits.tokens is not None else ()):
            properties[name] = {**properties[name], "maximum": limits.tokens}
        if "model" in properties:
            optional = "anyOf" in properties["model"]
            properties["model"] = {"enum": [*models, None] if optional else list(models)}
            if optional:
                properties["model"]["default"] = None
    paths: dict[str, Any] = {}
    for route in routes:
        if isinstance(route, Route) and route.include_in_schema:
            path = route.path.replace(":path}", "}")
            methods = (route.methods or set()) - {"HEAD"}
            paths[path] = {
                each.lower(): _operation(path, DESCRIBED[path], models) for each in sorted(methods)
            }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "qrun serve",
            "version": version,
            "description": limits.told(),
            "license": {"name": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": {**schemas, "Error": {"type": "object", "description": "What is wrong, in words"}},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        "security": [{}, {"bearer": []}, {"key": []}],
    }


# One of the events of a stream; its data is JSON, as text.
_EVENT = {
    "type": "object",
    "required": ["data"],
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
}


def _operation(path: str, described: Described, models: Sequence[str]) -> dict[str, Any]:
    answer: dict[str, Any] = {"type": "string" if described.media == "text/plain" else "object"}
    content = {described.media: {"schema": answer}}
    if described.body and "stream" in described.body.__struct_fields__:
        content["text/event-stream"] = {"schema": _EVENT}
    refusal = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    found: dict[str, Any] = {
        "summary": described.summary,
        "responses": {
            "200": {"description": "The answer", "content": content},
            "default": {"description": "A refusal", "content": refusal},
        },
    }
    if described.open:
        found["security"] = []
    if "{name}" in path:
        names = {"enum": list(models)}
        found["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": names}]
    if described.body:
        schema = {"$ref": f"#/components/schemas/{described.body.__name__}"}
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return found
