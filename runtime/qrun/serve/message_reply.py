"""The answers of ``POST /v1/messages``, whole and as events.

Source: "Messages" and "Streaming Messages" in Anthropic's API documentation.
"""

from __future__ import annotations

import json

from qrun.answer import Answer
from qrun.engine import Engine
from qrun.serve import events
from qrun.serve.asking import Asked
from qrun.serve.blocks import Block, BlockReply
from qrun.serve.errors import ApiError
from qrun.serve.messages import MessagesRequest
from qrun.serve.reply import Chunk
from qrun.serve.stamps import Stamps

_REASONS = {
    "eos": "end_turn",
    "stop": "stop_sequence",
    "length": "max_tokens",
    "context": "max_tokens",
    "time": "max_tokens",
    "cancelled": "end_turn",
}


class MessageReply(BlockReply):
    """One message: a block for each text, and one for each call."""

    done = b""  # the event message_stop ends a stream

    def __init__(self, engine: Engine, fields: MessagesRequest, asked: Asked, stamps: Stamps) -> None:
        super().__init__(engine, fields.model, asked, stamps)
        self.id = f"msg_{stamps.key()}"

    def whole(self) -> Chunk:
        answer = self.answers[0]
        self.finish(answer)
        content = [_content(block, whole=True) for block in self.blocks]
        return self._message(content, answer) | {"usage": self._usage(answer)}

    def opening(self) -> list[Chunk]:
        start = self._message([], None) | {"usage": self._usage(None)}
        return [{"type": "message_start", "message": start}]

    def opened(self, block: Block) -> list[Chunk]:
        content = _content(block, whole=False)
        start = {"type": "content_block_start", "index": block.index, "content_block": content}
        return [start] if block.index else [start, {"type": "ping"}]

    def added(self, block: Block, text: str) -> list[Chunk]:
        if block.call is None:
            return [_delta(block, {"type": "text_delta", "text": text})]
        return [_delta(block, {"type": "input_json_delta", "partial_json": each}) for each in ("", text)]

    def closed(self, block: Block) -> list[Chunk]:
        return [{"type": "content_block_stop", "index": block.index}]

    def ended(self, index: int, answer: Answer) -> list[Chunk]:
        usage = {
            key: value
            for key, value in self._usage(answer).items()
            if key.endswith("_tokens") and key != "cache_creation_input_tokens"
        }
        chunks = super().ended(index, answer)
        return [*chunks, {"type": "message_delta", "delta": self._end(answer), "usage": usage}]

    def closing(self) -> list[Chunk]:
        return [{"type": "message_stop"}]

    def refusal(self, error: ApiError) -> Chunk:
        return error.to_anthropic()

    def encode(self, chunk: Chunk) -> bytes:
        return events.event(chunk, chunk["type"])

    def _message(self, content: list[Chunk], answer: Answer | None) -> Chunk:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            **(self._end(answer) if answer else {"stop_reason": None, "stop_sequence": None}),
            "stop_details": None,
            "container": None,
        }

    def _end(self, answer: Answer) -> Chunk:
        reason = _REASONS[answer.finish_reason]
        if reason == "end_turn" and self.called:
            reason = "tool_use"
        return {"stop_reason": reason, "stop_sequence": answer.stop}

    def _usage(self, answer: Answer | None) -> Chunk:
        """Token counts; in Anthropic's API ``input_tokens`` leaves out those that were in the cache."""
        prompt = len(self.asked.prompts[0])
        cached = answer.reused_tokens if answer else 0
        return {
            "input_tokens": prompt - cached,
            "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": answer.completion_tokens if answer else 0,
            # Fields that the original always has; nothing here is split up further.
            "cache_creation": None,
            "output_tokens_details": None,
            "server_tool_use": None,
            "service_tier": None,
            "inference_geo": None,
        }


def _content(block: Block, *, whole: bool) -> Chunk:
    """A block as part of a message; before its deltas it is empty."""
    if block.call is None:
        return {"type": "text", "text": block.text if whole else "", "citations": None}
    arguments = json.loads(block.text) if whole else {}
    return {
        "type": "tool_use",
        "id": f"toolu_{block.key[:24]}",
        "name": block.call.name,
        "input": arguments,
        "caller": {"type": "direct"},
    }


def _delta(block: Block, delta: Chunk) -> Chunk:
    return {"type": "content_block_delta", "index": block.index, "delta": delta}
