"""OpenAI's two kinds of completion: the answers of one request as an object, or as the chunks of a stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qrun.answer import Answer, Piece
from qrun.decoding.sequence import Scored, Token
from qrun.engine import Engine
from qrun.serve.asking import Asked
from qrun.serve.fields import ChatRequest, Common
from qrun.serve.logprobs import PlainLogprobs, of_chat
from qrun.serve.reply import Chunk, Happening, Reply
from qrun.serve.stamps import Stamps
from qrun.text.tool_calls import ToolCall, ToolCallParser

_REASONS = {
    **{"eos": "stop", "stop": "stop", "cancelled": "stop"},
    **{"length": "length", "context": "length", "time": "length"},
}


class CompletionReply(Reply):
    """Answers to a chat, or to plain prompts.

    Args:
        engine: where they come from.
        fields: of the request.
        asked: the same request, as it was handed to the engine.
        stamps: where ids and times come from.
    """

    def __init__(self, engine: Engine, fields: Common, asked: Asked, stamps: Stamps) -> None:
        super().__init__(engine, fields.model, asked, stamps)
        self.chat = isinstance(fields, ChatRequest)
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{stamps.key()}"
        self.created = stamps.now()
        options = fields.stream_options
        self._tells_usage = options is not None and options.include_usage
        self._plain: dict[int, PlainLogprobs] = {}
        self._scored: dict[int, list[Token]] = {}  # tokens of prompts
        self._parsers: dict[int, ToolCallParser] = {}
        self._called: dict[int, int] = {}  # calls of an answer so far

    def whole(self) -> dict[str, Any]:
        """The object that is not streamed."""
        choices = []
        for index, answer in sorted(self.answers.items()):
            tokens = [*self._scored.get(index, []), *self.tokens.get(index, [])]
            message = self._message(index, answer)
            choice = {
                "index": index,
                "finish_reason": self._reason(index, answer),
                "logprobs": self._logprobs(index, tokens),
            }
            if self.chat:
                choice["message"] = message
            else:
                choice["text"] = self.asked.echoed[index] + answer.text
            choices.append(choice)
        kind = "chat.completion" if self.chat else "text_completion"
        return self._object(kind, choices) | {"usage": self.usage()}

    def opening(self) -> list[Chunk]:
        if self.chat:
            content = {"role": "assistant", "content": ""}
            return [self._chunk(index, content) for index in range(len(self.asked.prompts))]
        if self._scores:
            return []  # each prompt comes with its log-probabilities, once it is read
        return [self._chunk(index, text) for index, text in enumerate(self.asked.echoed) if text]

    @property
    def _scores(self) -> bool:
        return self.asked.scoring is not None and self.asked.scoring.count is not None

    def see(self, index: int, event: Happening) -> None:
        super().see(index, event)
        if isinstance(event, Scored):
            self._scored.setdefault(index, []).extend(event.tokens)

    def scored(self, index: int) -> list[Chunk]:
        tokens = self._scored[index]
        if len(tokens) < len(self.asked.prompts[index]):
            return []
        return [self._chunk(index, self.asked.echoed[index], logprobs=self._logprobs(index, tokens))]

    def piece(self, index: int, piece: Piece) -> list[Chunk]:
        logprobs = self._logprobs(index, piece.tokens)
        if self.asked.tools is None:
            content: Any = {"content": piece.text} if self.chat else piece.text
            return [self._chunk(index, content, logprobs=logprobs)]
        deltas = [self._delta(index, found) for found in self._parser(index).push(piece.text)]
        if logprobs is not None:  # in a chunk of their own: the text may be held back, or be part of a call
            deltas.insert(0, {"content": ""})
        return [
            self._chunk(index, delta, logprobs=None if place else logprobs)
            for place, delta in enumerate(deltas)
        ]

    def ended(self, index: int, answer: Answer) -> list[Chunk]:
        rest = [] if self.asked.tools is None else self._parser(index).flush()
        chunks = [self._chunk(index, self._delta(index, found)) for found in rest]
        return [*chunks, self._chunk(index, {} if self.chat else "", reason=self._reason(index, answer))]

    def _parser(self, index: int) -> ToolCallParser:
        if index not in self._parsers:
            parser = self.parser(index)
            assert parser is not None
            self._parsers[index] = parser
        return self._parsers[index]

    def _delta(self, index: int, found: str | ToolCall) -> dict[str, Any]:
        """A piece of text, or a whole call, as part of a message."""
        if isinstance(found, str):
            return {"content": found}
        place = self._called.get(index, 0)
        self._called[index] = place + 1
        return {"tool_calls": [{"index": place, **_described(found, self.stamps)}]}

    def _message(self, index: int, answer: Answer) -> dict[str, Any]:
        message: dict[str, Any] = {
            "role": "assistant",
            "content": answer.text,
            "refusal": None,
            "annotations": [],
        }
        parser = self.parser(index)
        if parser is None:
            return message
        found = [*parser.push(answer.text), *parser.flush()]
        calls = [_described(each, self.stamps) for each in found if isinstance(each, ToolCall)]
        if not calls:
            return message
        self._called[index] = len(calls)
        text = "".join(each for each in found if isinstance(each, str))
        return {**message, "content": text or None, "tool_calls": calls}

    def _reason(self, index: int, answer: Answer) -> str:
        reason = _REASONS[answer.finish_reason]
        return "tool_calls" if reason == "stop" and self._called.get(index) else reason

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
        tokenizer = self.engine.model.tokenizer
        if self.chat:
            return of_chat(tokenizer, tokens)
        if index not in self._plain:
            self._plain[index] = PlainLogprobs(tokenizer)
        return self._plain[index].push(tokens)


def _described(call: ToolCall, stamps: Stamps) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{stamps.key()[:24]}", "type": "function", "function": function}
