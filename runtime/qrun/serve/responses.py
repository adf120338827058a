"""OpenAI's newer API: ``POST /v1/responses``. Nothing is stored: a conversation is sent whole each time.

Source: "Responses" and "Streaming events" in OpenAI's API reference.
"""

from __future__ import annotations

import time
import uuid
from typing import Any

from qrun.answer import Answer, Piece
from qrun.engine import Engine
from qrun.serve import streams
from qrun.serve.asking import Asked, for_each
from qrun.serve.errors import ApiError
from qrun.serve.fields import Common, Harmless, texts_only
from qrun.serve.reply import Chunk, Reply


class ResponsesRequest(Harmless, kw_only=True):
    """``POST /v1/responses``. ``stream_options`` is accepted too, and changes nothing."""

    model: str
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = None
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    text: dict[str, Any] | None = None
    background: bool = False
    previous_response_id: str | None = None
    conversation: Any = None
    stream_options: Any = None
    truncation: Any = None


def ask_responses(engine: Engine, request: ResponsesRequest) -> Asked:
    """One prompt, one answer.

    Raises:
        ApiError: 400, with the field.
    """
    for name in ("previous_response_id", "conversation"):
        if getattr(request, name) is not None:
            raise ApiError(400, f"{name}: nothing is stored here, send the whole conversation", param=name)
    if request.background:
        raise ApiError(400, "background is not supported here", param="background")
    if request.truncation not in (None, "disabled"):
        raise ApiError(400, "truncation is not supported here", param="truncation")
    if request.max_output_tokens is not None and request.max_output_tokens < 1:
        raise ApiError(400, "max_output_tokens must be a whole number from 1 up", param="max_output_tokens")
    system = [{"role": "system", "content": request.instructions}] if request.instructions else []
    prompt = engine.model.chat_prompt([*system, *_messages(request.input)])
    common = Common(
        model=request.model,
        temperature=request.temperature,
        top_p=request.top_p,
        response_format=_response_format(request.text or {}),
    )
    try:
        return for_each(engine, common, [prompt], [""], {"max_tokens": request.max_output_tokens})
    except ApiError as error:
        if error.param is not None and error.param.startswith("response_format"):
            error.param = "text.format"
        raise


def _response_format(text: dict[str, Any]) -> dict[str, Any] | None:
    """``text.format`` in the form of chat completions, where the schema lies one level deeper."""
    extra = next((name for name in text if name != "format"), None)
    if extra is not None:
        raise ApiError(400, f"text.{extra} is not supported here", param=f"text.{extra}")
    form = text.get("format")
    if form is None:
        return None
    if not isinstance(form, dict):
        raise ApiError(400, "text.format must be an object", param="text.format")
    if form.get("type") != "json_schema":
        return form
    return {
        "type": "json_schema",
        "json_schema": {name: value for name, value in form.items() if name != "type"},
    }


def _messages(given: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    for index, item in enumerate(given):
        if item.get("type", "message") != "message":
            place = f"input[{index}].type"
            raise ApiError(400, f"{place} {item.get('type')!r} is not supported here", param=place)
    kept = [{key: value for key, value in item.items() if key in ("role", "content")} for item in given]
    return texts_only(kept, "input")


class ResponseReply(Reply):
    """One response with one message in it."""

    done = b""  # the event response.completed, or response.incomplete, ends a stream

    def __init__(self, engine: Engine, fields: ResponsesRequest, asked: Asked) -> None:
        super().__init__(engine, fields.model, asked)
        self._fields = fields
        self._id, self._item_id = f"resp_{uuid.uuid4().hex}", f"msg_{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._events = 0

    def whole(self) -> Chunk:
        return self._response(self.answers[0])

    def opening(self) -> list[Chunk]:
        part = self._part("")
        return [
            self._event("response.created", response=self._response(None)),
            self._event("response.in_progress", response=self._response(None)),
            self._event("response.output_item.added", output_index=0, item=self._item(None)),
            self._event("response.content_part.added", **self._place(), part=part),
        ]

    def piece(self, index: int, piece: Piece) -> list[Chunk]:
        return [self._event("response.output_text.delta", **self._place(), delta=piece.text, logprobs=[])]

    def ended(self, index: int, answer: Answer) -> list[Chunk]:
        text = answer.text
        return [
            self._event("response.output_text.done", **self._place(), text=text, logprobs=[]),
            self._event("response.content_part.done", **self._place(), part=self._part(text)),
            self._event("response.output_item.done", output_index=0, item=self._item(answer)),
        ]

    def closing(self) -> list[Chunk]:
        response = self._response(self.answers[0])
        return [self._event(f"response.{response['status']}", response=response)]

    def refusal(self, error: ApiError) -> Chunk:
        found = error.to_json()["error"]
        return self._event("error", code=found["code"], message=found["message"], param=found["param"])

    def encode(self, chunk: Chunk) -> bytes:
        return streams.event(chunk, chunk["type"])

    def _event(self, kind: str, **content: Any) -> Chunk:
        number, self._events = self._events, self._events + 1
        return {"type": kind, "sequence_number": number, **content}

    def _place(self) -> Chunk:
        return {"item_id": self._item_id, "output_index": 0, "content_index": 0}

    def _part(self, text: str) -> Chunk:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _item(self, answer: Answer | None) -> Chunk:
        return {
            "id": self._item_id,
            "type": "message",
            "role": "assistant",
            "status": "in_progress" if answer is None else _status(answer),
            "content": [] if answer is None else [self._part(answer.text)],
        }

    def _response(self, answer: Answer | None) -> Chunk:
        fields, cut = self._fields, answer is not None and _status(answer) == "incomplete"
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": "in_progress" if answer is None else _status(answer),
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": fields.instructions,
            "max_output_tokens": fields.max_output_tokens,
            "model": self.model,
            "output": [] if answer is None else [self._item(answer)],
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": self.asked.params[0].temperature,
            "text": {"format": (fields.text or {}).get("format") or {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_p": self.asked.params[0].top_p,
            "truncation": "disabled",
            "usage": None if answer is None else self._usage(),
            "metadata": fields.metadata or {},
        }

    def _usage(self) -> Chunk:
        counts = self.counts()
        return {
            "input_tokens": counts.prompt,
            "input_tokens_details": {"cached_tokens": counts.cached},
            "output_tokens": counts.completion,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": counts.prompt + counts.completion,
        }


def _status(answer: Answer) -> str:
    return "incomplete" if answer.finish_reason in ("length", "context") else "completed"
