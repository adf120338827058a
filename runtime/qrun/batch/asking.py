"""From a line to what the engine is asked, and from its answers to a record.

The request models are the server's: what a server would refuse, with its words, becomes an error record here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from qrun.batch.lines import Line, Problem, Record, refused
from qrun.engine import Engine
from qrun.errors import QrunError
from qrun.sampling.params import SamplingParams
from qrun.serve.asking import Asked
from qrun.serve.dialects import CHAT, COMPLETION, MESSAGES, RESPONSES, Dialect
from qrun.serve.errors import ApiError, from_qrun
from qrun.serve.fields import decode
from qrun.serve.reply import Reply
from qrun.serve.stamps import RepeatableStamps

DIALECTS: Mapping[str, Dialect] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETION,
    "/v1/responses": RESPONSES,
    "/v1/messages": MESSAGES,
}
# What an API calls the most tokens of an answer; the first is filled in where none of them is given.
_MOST_TOKENS = {
    CHAT: ("max_completion_tokens", "max_tokens"),
    COMPLETION: ("max_tokens",),
    RESPONSES: ("max_output_tokens",),
    MESSAGES: ("max_tokens",),
}
# A model that produces no end token would go on for minutes, to the end of its context.
DEFAULT_MAX_TOKENS = 512
_KINDS = {400: "invalid_request", 429: "busy", 503: "closing", 504: "timeout"}


@dataclass(frozen=True)
class Defaults:
    """What lines are asked with that say nothing of it themselves.

    Attributes:
        max_tokens: of an answer; None for what the model's generation_config.json says, else 512.
        fields: fields of a body by the names of chat completions, such as temperature or response_format.
        seed: with the line's number, the seed of a line without one.
    """

    max_tokens: int | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True)
class Prepared:
    """A line, ready for the engine.

    Attributes:
        line: which one.
        asked: prompts and parameters, one entry for each answer.
        reply: collects the answers.
    """

    line: Line
    asked: Asked
    reply: Reply


class Asking:
    """Makes requests of lines.

    Args:
        engine: that will answer them.
        defaults: for lines that say nothing themselves.
        name: of the job; ids of answers follow from it and from the line's number.
    """

    def __init__(self, engine: Engine, defaults: Defaults | None = None, *, name: str = "") -> None:
        self.engine, self.defaults, self.name = engine, defaults or Defaults(), name

    def prepare(self, line: Line) -> Prepared | Record:
        """What the engine is asked for a line; or the error record of one that cannot be asked."""
        if line.problem is not None:
            return refused(line, line.problem)
        dialect = DIALECTS.get(line.url)
        if dialect is None:
            text = f"url {line.url!r} is not known here; known are {', '.join(DIALECTS)}"
            return self._refused(line, ApiError(404, text, param="url"))
        try:
            fields: Any = decode(self._body(line, dialect), dialect.fields)
            if fields.stream:
                raise ApiError(400, "stream has no place in a batch", param="stream")
            asked = dialect.ask(self.engine, fields)
        except ApiError as error:
            return self._refused(line, error)
        except QrunError as error:
            return self._refused(line, from_qrun(error))
        asked = replace(asked, params=[self._settled(line, each, n) for n, each in enumerate(asked.params)])
        stamps = RepeatableStamps(f"{self.name}\n{line.number}")
        return Prepared(line, asked, dialect.reply(self.engine, fields, asked, stamps))

    def record(self, prepared: Prepared) -> Record:
        """The record of a line all of whose answers have ended."""
        reply, line = prepared.reply, prepared.line
        body = reply.whole()
        # How much of a prompt was found in the cache depends on what ran before it, and would differ after a
        # restart.
        for name in ("prompt_tokens_details", "input_tokens_details", "cache_read_input_tokens"):
            body.get("usage", {}).pop(name, None)
        counts, first = reply.counts(), reply.answers[0]
        message = body["choices"][0].get("message", {}) if "choices" in body else {}
        reason = body["choices"][0]["finish_reason"] if "choices" in body else first.finish_reason
        return Record(
            *(line.number, line.custom_id, 200, body),
            text=message.get("content", first.text),
            finish_reason=reason,
            tool_calls=tuple(message.get("tool_calls", ())),
            prompt_tokens=counts.prompt,
            completion_tokens=counts.completion,
        )

    def failed(self, prepared: Prepared, error: QrunError) -> Record:
        """The record of a line whose answer could not be completed."""
        return self._refused(prepared.line, from_qrun(error, begun=True))

    def _refused(self, line: Line, error: ApiError) -> Record:
        kind = error.code or _KINDS.get(error.status, "not_found" if error.status == 404 else "failed")
        return refused(line, Problem(kind, error.message), error.status, error.body(line.url))

    def _body(self, line: Line, dialect: Dialect) -> bytes:
        """The body with all defaults, as a client would send it."""
        body = {"model": self.engine.model.manifest.name, **line.body}
        names = _MOST_TOKENS[dialect]
        most = self.defaults.max_tokens
        if dialect is MESSAGES and most is None:
            most = DEFAULT_MAX_TOKENS
        if dialect is COMPLETION and line.custom_id is None:
            # A plain prompt, and no request of this API: that would end after 16 tokens, and would take
            # special tokens that are written out in a prompt for such.
            body["prompt"] = self.engine.model.plain_prompt(line.body["prompt"])
            if most is None:
                most = self.engine.resolve({}).max_tokens or DEFAULT_MAX_TOKENS
        if most is not None and all(body.get(name) is None for name in names):
            body[names[0]] = most
        for name, value in self.defaults.fields.items():
            if dialect is RESPONSES and name == "response_format":
                text = body.get("text")
                if text is None or (isinstance(text, dict) and text.get("format") is None):
                    body["text"] = {**(text or {}), "format": {"type": "json_schema", **value["json_schema"]}}
            elif body.get(name) is None:
                body[name] = value
        return msgspec.json.encode(body)

    def _settled(self, line: Line, params: SamplingParams, index: int) -> SamplingParams:
        """Parameters that leave nothing to chance: a seed, and an end."""
        if params.seed is None:
            key = f"{self.defaults.seed}\n{line.number}\n{index}".encode()
            params = replace(params, seed=int.from_bytes(hashlib.sha256(key).digest()[:6], "big"))
        return params if params.max_tokens is not None else replace(params, max_tokens=DEFAULT_MAX_TOKENS)
