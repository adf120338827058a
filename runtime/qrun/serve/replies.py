"""The answers of one completion on their way out: as one object, or as the chunks of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from qrun.answer import Answer, Piece
from qrun.decoding.sequence import Token
from qrun.engine import Engine
from qrun.serve.asking import Asked

_REASONS = {"eos": "stop", "stop": "stop", "length": "length", "context": "length", "cancelled": "stop"}


@dataclass
class Reply:
    """The answers of one request on their way out.

    Attributes:
        chat: whether it is a chat, or a plain completion.
        model: the name under which the client asked.
        answers: by index, as they end.
    """

    chat: bool
    model: str
    engine: Engine
    asked: Asked
    answers: dict[int, Answer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self._tokens: dict[int, list[Token]] = {}
        self._offsets: dict[int, int] = {}

    def collect(self, index: int, piece: Piece) -> None:
        """Keep the tokens of an answer that is given whole."""
        self._tokens.setdefault(index, []).extend(piece.tokens)

    def whole(self) -> dict[str, Any]:
        """The object that is not streamed."""
        choices = []
        for index, answer in sorted(self.answers.items()):
            tokens = self._tokens.get(index, [])
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

    def first(self, index: int) -> dict[str, Any] | None:
        """The chunk before any text, if there is one."""
        if self.chat:
            return self._chunk(index, {"role": "assistant", "content": ""})
        echoed = self.asked.echoed[index]
        return self._chunk(index, echoed) if echoed else None

    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        """A chunk of text."""
        content: Any = {"content": piece.text} if self.chat else piece.text
        return self._chunk(index, content, logprobs=self._logprobs(index, piece.tokens))

    def last(self, index: int, answer: Answer) -> dict[str, Any]:
        """The chunk that says why the answer has ended."""
        return self._chunk(index, {} if self.chat else "", reason=_REASONS[answer.finish_reason])

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk, where it was asked for."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return self._object(kind, []) | {"usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Tokens of all answers together; a prompt counts once, however many answers it has."""
        answers = [self.answers[index] for index in sorted(self.answers)]
        distinct = {id(ids): answer for ids, answer in zip(self.asked.prompts, answers)}.values()
        prompt = sum(answer.prompt_tokens for answer in distinct)
        completion = sum(answer.completion_tokens for answer in answers)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(answer.reused_tokens for answer in distinct)},
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
