"""The answers of ``POST /v1/responses``, whole and as events.

Source: "Responses" and "Streaming events" in OpenAI's API reference.
"""

from __future__ import annotations

from typing import Any

from qrun.answer import Answer
from qrun.engine import Engine
from qrun.serve import events
from qrun.serve.asking import Asked
from qrun.serve.blocks import Block, BlockReply
from qrun.serve.errors import ApiError
from qrun.serve.reply import Chunk
from qrun.serve.responses import ResponsesRequest
from qrun.serve.stamps import Stamps

_TOOL = {"type": "function", "description": None, "parameters": None, "strict": False}


class ResponseReply(BlockReply):
    """One response: an item for each text, and one for each call."""

    done = b""  # the event response.completed, or response.incomplete, ends a stream

    def __init__(self, engine: Engine, fields: ResponsesRequest, asked: Asked, stamps: Stamps) -> None:
        super().__init__(engine, fields.model, asked, stamps)
        self._fields = fields
        self._id = f"resp_{stamps.key()}"
        self._created = stamps.now()
        self._events = 0

    def whole(self) -> Chunk:
        self.finish(self.answers[0])
        return self._response(self.answers[0])

    def opening(self) -> list[Chunk]:
        return [
            self._event("response.created", response=self._response(None)),
            self._event("response.in_progress", response=self._response(None)),
        ]

    def opened(self, block: Block) -> list[Chunk]:
        item = self._item(block, "in_progress")
        added = self._event("response.output_item.added", output_index=block.index, item=item)
        if block.call is not None:
            return [added]
        return [added, self._event("response.content_part.added", **_place(block), part=_part(""))]

    def added(self, block: Block, text: str) -> list[Chunk]:
        if block.call is None:
            return [self._event("response.output_text.delta", **_place(block), delta=text, logprobs=[])]
        return [self._event("response.function_call_arguments.delta", **_item_place(block), delta=text)]

    def closed(self, block: Block) -> list[Chunk]:
        if block.call is None:
            chunks = [
                self._event("response.output_text.done", **_place(block), text=block.text, logprobs=[]),
                self._event("response.content_part.done", **_place(block), part=_part(block.text)),
            ]
        else:
            kind, name = "response.function_call_arguments.done", block.call.name
            chunks = [self._event(kind, **_item_place(block), name=name, arguments=block.text)]
        item = self._item(block, self._status_of(block))
        return [*chunks, self._event("response.output_item.done", output_index=block.index, item=item)]

    def closing(self) -> list[Chunk]:
        response = self._response(self.answers[0])
        return [self._event(f"response.{response['status']}", response=response)]

    def refusal(self, error: ApiError) -> Chunk:
        found = error.to_json()["error"]
        return self._event("error", code=found["code"], message=found["message"], param=found["param"])

    def encode(self, chunk: Chunk) -> bytes:
        return events.event(chunk, chunk["type"])

    def _event(self, kind: str, **content: Any) -> Chunk:
        number, self._events = self._events, self._events + 1
        return {"type": kind, "sequence_number": number, **content}

    def _item(self, block: Block, status: str) -> Chunk:
        begun = status != "in_progress"
        if block.call is not None:
            return {
                "id": _item_id(block),
                "type": "function_call",
                "status": status,
                "call_id": f"call_{block.key[:24]}",
                "name": block.call.name,
                "arguments": block.text if begun else "",
            }
        return {
            "id": _item_id(block),
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [_part(block.text)] if begun else [],
        }

    def _status_of(self, block: Block) -> str:
        """Only the last block of an answer can have been cut off, and never a call: that would be a text."""
        last = block is self.blocks[-1] and block.call is None
        return _status(self.answers[0]) if last and self.answers else "completed"

    def _response(self, answer: Answer | None) -> Chunk:
        fields, cut = self._fields, answer is not None and _status(answer) == "incomplete"
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": "in_progress" if answer is None else _status(answer),
            "completed_at": None if answer is None or cut else self.stamps.now(),
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": fields.instructions,
            "max_output_tokens": fields.max_output_tokens,
            "model": self.model,
            "output": []
            if answer is None
            else [self._item(each, self._status_of(each)) for each in self.blocks],
            "parallel_tool_calls": fields.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": self.asked.params[0].temperature,
            "text": {"format": (fields.text or {}).get("format") or {"type": "text"}},
            "tool_choice": "auto" if fields.tool_choice is None else fields.tool_choice,
            "tools": [_TOOL | tool for tool in fields.tools or ()],
            "top_p": self.asked.params[0].top_p,
            "truncation": "disabled",
            "usage": None if answer is None else self._usage(),
            "metadata": fields.metadata or {},
            "presence_penalty": self.asked.params[0].presence_penalty,
            "frequency_penalty": self.asked.params[0].frequency_penalty,
            "top_logprobs": 0,
            "reasoning": None,
            "max_tool_calls": None,
            "service_tier": "default",
            "safety_identifier": fields.safety_identifier,
            "prompt_cache_key": fields.prompt_cache_key,
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
    return "incomplete" if answer.finish_reason in ("length", "context", "time") else "completed"


def _item_id(block: Block) -> str:
    return f"{'msg' if block.call is None else 'fc'}_{block.key}"


def _item_place(block: Block) -> Chunk:
    return {"item_id": _item_id(block), "output_index": block.index}


def _place(block: Block) -> Chunk:
    return {**_item_place(block), "content_index": 0}


def _part(text: str) -> Chunk:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
