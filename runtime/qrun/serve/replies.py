"""OpenAI's two kinds of completion: the answers of one request as an object, or as the chunks of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from qrun.answer import Answer, Piece
from qrun.decoding.sequence import Token
from qrun.engine import Engine
from qrun.serve.asking import Asked
from qrun.serve.fields import ChatRequest, Common
from qrun.serve.reply import Chunk, Reply

_REASONS = {"eos": "stop", "stop": "stop", "length": "length", "context": "length", "cancelled": "stop"}


class CompletionReply(Reply):
    """Answers to a chat, or to plain prompts.

    Args:
        engine: where they come from.
        fields: of the request.
        asked: what became of it.
    """

    def __init__(self, engine: Engine, fields: Common, asked: Asked) -> None:
        super().__init__(engine, fields.model, asked)
        self.chat = isinstance(fields, ChatRequest)
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        options = fields.stream_options
        self._tells_usage = options is not None and options.include_usage
        self._offsets: dict[int, int] = {}

    def whole(self) -> dict[str, Any]:
        """The object that is not streamed."""
        choices = []
        for index, answer in sorted(self.answers.items()):
            tokens = self.tokens.get(index, [])
            choice = {
                "index": index,
                "finish_reason": _REASONS[answer.finish_reason],
                "logprobs": self._logprobs(index, tokens),
            }
            if self.chat:
                choice["message"] = {"role": "assistant", "content": answer.text, "refusal": None}
            else:
                choice["text"] = self.asked.echoed[index] + answer.text
            choices.append(choice)
        kind = "chat.completion" if self.chat else "text_completion"
        return self._object(kind, choices) | {"usage": self.usage()}

    def opening(self) -> list[Chunk]:
        if self.chat:
            content = {"role": "assistant", "content": ""}
            return [self._chunk(index, content) for index in range(len(self.asked.prompts))]
        return [self._chunk(index, text) for index, text in enumerate(self.asked.echoed) if text]

    def piece(self, index: int, piece: Piece) -> list[Chunk]:
        content: Any = {"content": piece.text} if self.chat else piece.text
        return [self._chunk(index, content, logprobs=self._logprobs(index, piece.tokens))]

    def ended(self, index: int, answer: Answer) -> list[Chunk]:
        return [self._chunk(index, {} if self.chat else "", reason=_REASONS[answer.finish_reason])]

    def closing(self) -> list[Chunk]:
        if not self._tells_usage:
            return []
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return [self._object(kind, []) | {"usage": self.usage()}]

    def usage(self) -> dict[str, Any]:
        """Tokens of all answers together."""
        counts = self.counts()
        return {
            "prompt_tokens": counts.prompt,
            "completion_tokens": counts.completion,
            "total_tokens": counts.prompt + counts.completion,
            "prompt_tokens_details": {"cached_tokens": counts.cached},
        }

    def _chunk(
        self, index: int, content: Any, *, reason: str | None = None, logprobs: Any = None
    ) -> dict[str, Any]:
        name = "delta" if self.chat else "text"
        choice = {"index": index, name: content, "finish_reason": reason, "logprobs": logprobs}
        return self._object("chat.completion.chunk" if self.chat else "text_completion", [choice])

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self.asked.params[index].logprobs is None:
            return None
        spelled = [
            (self._token(token.token_id), token.logprobs) for token in tokens if token.logprobs is not None
        ]
        if self.chat:
            content = [
                {
                    **text,
                    "logprob": found.chosen,
                    "top_logprobs": [
                        {**self._token(token_id), "logprob": value} for token_id, value in found.likeliest
                    ],
                }
                for text, found in spelled
            ]
            return {"content": content, "refusal": None}
        tokens_text = [text["token"] for text, _ in spelled]
        offsets, place = [], self._offsets.get(index, 0)
        for text in tokens_text:
            offsets.append(place)
            place += len(text)
        self._offsets[index] = place
        return {
            "tokens": tokens_text,
            "token_logprobs": [found.chosen for _, found in spelled],
            "top_logprobs": [
                {self._token(token_id)["token"]: value for token_id, value in found.likeliest}
                for _, found in spelled
            ],
            "text_offset": offsets,
        }

    def _token(self, token_id: int) -> dict[str, Any]:
        text = self.engine.model.tokenizer.decode([token_id], skip_special_tokens=False)
        return {"token": text, "bytes": list(text.encode())}
