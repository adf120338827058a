"""What the answers of a request have in common, in whatever API it was asked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from qrun.answer import Answer, Piece
from qrun.decoding.sequence import Prefilled, Scored, Token
from qrun.engine import Engine
from qrun.serve import events
from qrun.serve.asking import Asked
from qrun.serve.errors import ApiError
from qrun.serve.stamps import Stamps
from qrun.text.tool_calls import ToolCallParser

Chunk = dict[str, Any]
Happening = Piece | Answer | Prefilled | Scored


@dataclass(frozen=True)
class Counts:
    """Tokens of all answers of a request; a prompt counts once, however many answers it has."""

    prompt: int
    cached: int
    completion: int


class Reply(ABC):
    """The answers of one request on their way out, whole or as the chunks of a stream.

    Attributes:
        engine: where they come from.
        model: the name under which the client asked.
        asked: what was asked.
        answers: by index, as they end.
        tokens: by index, those with log-probabilities, of answers that are given whole.
        stamps: where ids and times come from.
    """

    # The bytes that end a stream.
    done = events.DONE

    def __init__(self, engine: Engine, model: str, asked: Asked, stamps: Stamps) -> None:
        self.engine, self.model, self.asked, self.stamps = engine, model, asked, stamps
        self.answers: dict[int, Answer] = {}
        self.tokens: dict[int, list[Token]] = {}
        self._started, self._first_text = perf_counter(), 0.0

    def parser(self, index: int) -> ToolCallParser | None:
        """A new one for the calls of an answer; None where no tool may be called."""
        tools = self.asked.tools
        return None if tools is None else tools.parser(self.engine.model, self.asked.prompts[index])

    def see(self, index: int, event: Happening) -> None:
        """Keep what is reported later of an answer: its end, and when its text began."""
        if isinstance(event, Answer):
            self.answers[index] = event
        elif isinstance(event, Piece) and not self._first_text:
            self._first_text = perf_counter()

    def facts(self) -> dict[str, Any]:
        """For the log line and the metrics."""
        if not self.answers:
            return {}
        counts, answers = self.counts(), list(self.answers.values())
        found: dict[str, Any] = {
            "prompt_tokens": counts.prompt,
            "cached_tokens": counts.cached,
            "completion_tokens": counts.completion,
            "finish": ",".join(answer.finish_reason for answer in answers),
        }
        if self._first_text:
            found["first_ms"] = round(1000 * (self._first_text - self._started), 1)
        steps = sum(max(0, answer.completion_tokens - 1) for answer in answers)
        if steps:
            seconds = sum(answer.decode_seconds for answer in answers)
            found["between_ms"] = round(1000 * seconds / steps, 2)
        return found

    def texts(self) -> dict[str, Any]:
        """Prompts and answers, for a log that holds them."""
        prompts = {id(ids): ids for ids in self.asked.prompts}.values()
        decode = self.engine.model.tokenizer.decode
        answers = [answer.text for _, answer in sorted(self.answers.items())]
        return {"prompts": [decode(ids, skip_special_tokens=False) for ids in prompts], "answers": answers}

    def collect(self, index: int, piece: Piece) -> None:
        """Keep the tokens of an answer that is given whole."""
        self.tokens.setdefault(index, []).extend(piece.tokens)

    def counts(self) -> Counts:
        """Of the answers that have ended."""
        found = sorted(self.answers.items())
        distinct = {id(self.asked.prompts[index]): answer for index, answer in found}.values()
        return Counts(
            sum(answer.prompt_tokens for answer in distinct),
            sum(answer.reused_tokens for answer in distinct),
            sum(answer.completion_tokens for _, answer in found),
        )

    @abstractmethod
    def whole(self) -> Chunk:
        """The object that is not streamed, once all answers have ended."""

    @abstractmethod
    def opening(self) -> list[Chunk]:
        """What a stream begins with."""

    @abstractmethod
    def piece(self, index: int, piece: Piece) -> list[Chunk]:
        """Text of one answer."""

    def scored(self, index: int) -> list[Chunk]:
        """More of a prompt has its log-probabilities."""
        return []

    @abstractmethod
    def ended(self, index: int, answer: Answer) -> list[Chunk]:
        """One answer has ended."""

    @abstractmethod
    def closing(self) -> list[Chunk]:
        """What a stream ends with, before ``done``."""

    def refusal(self, error: ApiError) -> Chunk:
        """What is sent in place of the rest."""
        return error.to_json()

    def encode(self, chunk: Chunk) -> bytes:
        """A chunk as an event."""
        return events.event(chunk)
