"""Anthropic's API: ``POST /v1/messages`` and ``/v1/messages/count_tokens``.

Source: "Messages" and "Streaming Messages" in Anthropic's API documentation.
"""

from __future__ import annotations

import uuid
from typing import Any

import msgspec

from qrun.answer import Answer, Piece
from qrun.engine import Engine
from qrun.errors import QrunError
from qrun.serve import streams
from qrun.serve.asking import Asked, check_length
from qrun.serve.errors import ApiError, from_qrun
from qrun.serve.fields import texts_only
from qrun.serve.reply import Chunk, Reply

_REASONS = {
    "eos": "end_turn",
    "stop": "stop_sequence",
    "length": "max_tokens",
    "context": "max_tokens",
    "cancelled": "end_turn",
}


class CountRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """``POST /v1/messages/count_tokens``."""

    model: str
    messages: list[dict[str, Any]]
    system: str | list[dict[str, Any]] | None = None


class MessagesRequest(CountRequest, kw_only=True):
    """``POST /v1/messages``. The last two are accepted and change nothing."""

    max_tokens: int
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None
    metadata: Any = None
    service_tier: Any = None


def prompt_of(engine: Engine, request: CountRequest) -> list[int]:
    """The prompt's token ids.

    Raises:
        ApiError: 400, with the field.
    """
    messages = texts_only(request.messages)
    for index, message in enumerate(messages):
        if message["role"] not in ("user", "assistant"):
            place = f"messages[{index}].role"
            raise ApiError(400, f"{place} must be user or assistant, not {message['role']!r}", param=place)
    if request.system:
        system = texts_only([{"role": "system", "content": request.system}], "system")
        messages = [*system, *messages]
    try:
        return engine.model.chat_prompt(messages)
    except QrunError as error:
        raise from_qrun(error) from None


def ask_messages(engine: Engine, request: MessagesRequest) -> Asked:
    """One prompt, one answer.

    Raises:
        ApiError: 400, with the field.
    """
    prompt = prompt_of(engine, request)
    check_length(engine, prompt)
    sampling = {
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "stop": request.stop_sequences,
    }
    try:
        params, _ = engine.model.resolve(sampling)
    except QrunError as error:
        refusal = from_qrun(error)
        named = {"stop": "stop_sequences"}
        name = next((name for name in sampling if error.what.startswith(name)), None)
        refusal.param = named.get(name or "", name)
        raise refusal from None
    return Asked([prompt], [params], [""])


class MessageReply(Reply):
    """One message."""

    done = b""  # the event message_stop ends a stream

    def __init__(self, engine: Engine, fields: MessagesRequest, asked: Asked) -> None:
        super().__init__(engine, fields.model, asked)
        self.id = f"msg_{uuid.uuid4().hex}"

    def whole(self) -> Chunk:
        answer = self.answers[0]
        content = [{"type": "text", "text": answer.text}]
        return self._message(content, answer) | {"usage": self._usage(answer)}

    def opening(self) -> list[Chunk]:
        start = self._message([], None) | {"usage": self._usage(None)}
        block = {"type": "text", "text": ""}
        return [
            {"type": "message_start", "message": start},
            {"type": "content_block_start", "index": 0, "content_block": block},
            {"type": "ping"},
        ]

    def piece(self, index: int, piece: Piece) -> list[Chunk]:
        delta = {"type": "text_delta", "text": piece.text}
        return [{"type": "content_block_delta", "index": 0, "delta": delta}]

    def ended(self, index: int, answer: Answer) -> list[Chunk]:
        usage = {
            key: value for key, value in self._usage(answer).items() if key != "cache_creation_input_tokens"
        }
        return [
            {"type": "content_block_stop", "index": 0},
            {"type": "message_delta", "delta": self._end(answer), "usage": usage},
        ]

    def closing(self) -> list[Chunk]:
        return [{"type": "message_stop"}]

    def refusal(self, error: ApiError) -> Chunk:
        return error.to_anthropic()

    def encode(self, chunk: Chunk) -> bytes:
        return streams.event(chunk, chunk["type"])

    def _message(self, content: list[Chunk], answer: Answer | None) -> Chunk:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            **(self._end(answer) if answer else {"stop_reason": None, "stop_sequence": None}),
        }

    def _end(self, answer: Answer) -> Chunk:
        return {"stop_reason": _REASONS[answer.finish_reason], "stop_sequence": answer.stop}

    def _usage(self, answer: Answer | None) -> Chunk:
        """Token counts; in Anthropic's API ``input_tokens`` leaves out those that were in the cache."""
        prompt = len(self.asked.prompts[0])
        cached = answer.reused_tokens if answer else 0
        return {
            "input_tokens": prompt - cached,
            "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": answer.completion_tokens if answer else 0,
        }
