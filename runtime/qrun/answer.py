"""One answer: its tokens become final text piece by piece, and its last event sums it up."""

from __future__ import annotations

from collections.abc import Generator
from collections.abc import Sequence as Tokens
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

from qrun.decoding.generate import Context, FinishReason, Prefilled, Token, run
from qrun.decoding.sequence import Sequence
from qrun.sampling.constraint import Constraint
from qrun.sampling.params import SamplingParams
from qrun.text.streaming import IncrementalDetokenizer, StopStrings
from qrun.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that has become final: whole characters, and no part of a stop string.

    It is never empty, unless log-probabilities were asked for: then ``tokens`` are those since the piece
    before, and the last of them may have no text of their own.
    """

    text: str
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """The last event of an answer.

    Attributes:
        text: all pieces together.
        token_ids: what was generated; an end token is not among them, a stop string's tokens are.
        finish_reason: "eos" (the model ended it), "stop" (a stop string), "length" (max_tokens),
            "context" (no room left), "time" (the engine's ``max_seconds``) or "cancelled".
        prompt_tokens: length of the prompt, of which ``reused_tokens`` were in the KV cache already.
        completion_tokens: number of ``token_ids``.
        prefill_seconds: until the first logits.
        decode_seconds: from there to the end, including whatever the caller did between the events.
        stop: the stop string that ended it, if one did.
        guessed_tokens: tokens that were tried in steps of several tokens (``speculate``).
        accepted_tokens: those of them that are part of the answer.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    reused_tokens: int
    completion_tokens: int
    prefill_seconds: float
    decode_seconds: float
    stop: str | None = None
    guessed_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def prefill_tokens_per_second(self) -> float:
        """Rate at which the prompt's new tokens were read."""
        return _rate(self.prompt_tokens - self.reused_tokens, self.prefill_seconds)

    @property
    def decode_tokens_per_second(self) -> float:
        """Rate of the tokens after the first one, which came with the prompt's logits."""
        return _rate(self.completion_tokens - 1, self.decode_seconds)

    def to_json(self) -> dict[str, Any]:
        """All of it as one JSON object."""
        return {
            **asdict(self),
            "token_ids": list(self.token_ids),
            "prefill_tokens_per_second": round(self.prefill_tokens_per_second, 2),
            "decode_tokens_per_second": round(self.decode_tokens_per_second, 2),
        }


Event = Prefilled | Piece | Answer


class Wording:
    """The text of an answer while its tokens arrive: no half characters, and no part of a stop string.

    Attributes:
        text: what has become final so far.
        token_ids: what was generated so far.
        stop: the stop string that has come, if one has; nothing after it is text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Tokens[str]) -> None:
        self.text = ""
        self.token_ids: list[int] = []
        self.stop: str | None = None
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._stops = StopStrings(stop)

    def push(self, token_id: int) -> str:
        """The text that has become final with a token, often empty."""
        self.token_ids.append(token_id)
        return self._show(self._detokenizer.push(token_id))

    def end(self) -> str:
        """The text that was held back, now that no further token comes."""
        found = self._show(self._detokenizer.flush())
        if self.stop is None and (rest := self._stops.flush()):
            self.text += rest
            found += rest
        return found

    def _show(self, text: str) -> str:
        safe, self.stop = self._stops.push(text)
        self.text += safe
        return safe


class Answering:
    """An answer in the making: iterate over ``events`` once.

    Attributes:
        finish_reason: None until the answer has ended by itself or was cancelled.
    """

    def __init__(
        self,
        context: Context,
        tokenizer: Tokenizer,
        prompt_ids: Tokens[int],
        params: SamplingParams,
        constraint: Constraint | None = None,
    ) -> None:
        self.finish_reason: FinishReason | None = None
        self._wording = Wording(tokenizer, params.stop)
        self._sequence = Sequence(prompt_ids, params, context.cache.limit, constraint)
        self._tokens = run(context, self._sequence)
        self._cancelled = False

    @property
    def text(self) -> str:
        """What has become final so far."""
        return self._wording.text

    @property
    def token_ids(self) -> list[int]:
        """What was generated so far."""
        return self._wording.token_ids

    def cancel(self) -> None:
        """End the answer after the step that is running. A signal handler or another thread may call it."""
        self._cancelled = True

    def events(self) -> Generator[Event, None, None]:
        """Progress through the prompt, pieces of text, and one ``Answer`` at the end.

        Raises:
            QrunError: see ``generate.generate``.
        """
        started = prefilled = perf_counter()
        reused: int | None = None
        for event in self._tokens:
            if self._cancelled:  # cancelled while this step was computed: drop its token
                self.finish_reason = "cancelled"
            elif isinstance(event, Prefilled):
                reused = event.done if reused is None else reused
                prefilled = perf_counter()
                yield event
            elif isinstance(event, Token):
                yield from self._show(self._wording.push(event.token_id))
            else:
                yield from self._show(self._wording.end())
                self.finish_reason = self.finish_reason or event.reason
            if self._cancelled and self.finish_reason is None:
                self.finish_reason = "cancelled"
            if self.finish_reason is not None:
                break
        ended = perf_counter()
        assert self.finish_reason is not None, "generate ends with Finished"
        yield Answer(
            self.text,
            tuple(self.token_ids),
            self.finish_reason,
            len(self._sequence.prompt_ids),
            reused or 0,
            len(self.token_ids),
            prefilled - started,
            ended - prefilled,
            self._wording.stop,
            self._sequence.guessed,
            self._sequence.accepted,
        )

    def _show(self, text: str) -> Generator[Piece, None, None]:
        if self._wording.stop is not None:
            self.finish_reason = "stop"
        if text:
            yield Piece(text)


def _rate(tokens: int, seconds: float) -> float:
    return max(0, tokens) / seconds if seconds > 0 else 0.0
