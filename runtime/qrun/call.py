"""One prompt on its way through an engine: the sequence's tokens become events for whoever has asked."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from time import monotonic

from qrun.answer import Answer, Event, Piece, Wording
from qrun.decoding.sequence import Event as SequenceEvent
from qrun.decoding.sequence import Finished, FinishReason, Prefilled, Scored, Scoring, Token
from qrun.decoding.sequence import Sequence as TokenSequence
from qrun.errors import QrunError
from qrun.model import Model
from qrun.sampling.constraint import Constraint
from qrun.sampling.params import SamplingParams

# Called by the engine's thread for each event of an answer; the last one is an ``Answer`` or a ``QrunError``.
Listener = Callable[["Event | Scored | QrunError"], None]


_log = logging.getLogger("qrun.engine")
# Every token of an answer is compared with its stop strings, in the thread that all answers share.
MOST_STOPS, MOST_STOP_CHARACTERS = 64, 8192


def check_stop(stop: Sequence[str]) -> None:
    """Refuse more stop strings than one answer may make the others wait for.

    Raises:
        QrunError: too many, or too long ones.
    """
    if len(stop) > MOST_STOPS or sum(map(len, stop)) > MOST_STOP_CHARACTERS:
        raise QrunError(
            f"stop must be at most {MOST_STOPS} strings of {MOST_STOP_CHARACTERS:,} characters together, "
            f"not {len(stop):,} of {sum(map(len, stop)):,}"
        )


class EngineBusyError(QrunError):
    """All slots are taken and the queue is full; a later try may succeed."""


class EngineClosedError(QrunError):
    """The engine takes no more prompts."""


class EngineTimeoutError(QrunError):
    """The time of a prompt was over before its answer had begun."""


class Call:
    """One prompt on its way through the engine.

    Attributes:
        client: who asks; the queue is fair between clients.

    Args:
        seconds: that it may take, with waiting; then it ends with what there is of its answer.
    """

    def __init__(
        self,
        model: Model,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        listener: Listener,
        client: str,
        *,
        constraint: Constraint | None = None,
        scoring: Scoring | None = None,
        seconds: float | None = None,
    ) -> None:
        self.client = client
        self._seconds = seconds
        self._until = None if seconds is None else monotonic() + seconds
        limit = model.manifest.model.context_length
        self.sequence = TokenSequence(prompt_ids, params, limit, constraint, scoring)
        self._listener = listener
        self._wording = Wording(model.tokenizer, params.stop)
        self._keeps_tokens = params.logprobs is not None
        self._tokens: list[Token] = []
        self.ended = False

    def cancel(self) -> None:
        """End it after the step that is running; its ``Answer`` says "cancelled". Any thread may do so."""
        self.sequence.cancel()

    def expire(self, now: float) -> None:
        """End it if its time is over: with the answer so far, or with an error where there is none yet."""
        if self.ended or self._until is None or now < self._until:
            return
        self.cancel()
        if not self.sequence.token_ids:
            self.fail(EngineTimeoutError(f"the answer was not begun within {self._seconds:g} seconds"))
        else:
            self._safely(self._end_in_time)

    def _end_in_time(self) -> None:
        self._show(self._wording.end(), last=True)
        self._end("time", self.sequence.finish("time"))

    def take(self, event: SequenceEvent) -> None:
        """Handle an event of its sequence; the engine's thread calls this."""
        self._safely(lambda: self._take(event))

    def _safely(self, work: Callable[[], None]) -> None:
        """Do something in the engine's thread: a fault in one answer ends that answer, and not the thread."""
        try:
            work()
        except Exception as error:
            _log.exception("an answer could not be told")
            self.cancel()
            self.fail(QrunError(f"the answer could not be completed: {type(error).__name__}: {error}"))

    def _take(self, event: SequenceEvent) -> None:
        if self.ended:  # by a stop string; the scheduler drops the sequence only in its next step
            return
        if isinstance(event, Prefilled | Scored):
            self._tell(event)
        elif isinstance(event, Token):
            if self._keeps_tokens:
                self._tokens.append(event)
            self._show(self._wording.push(event.token_id))
            if self._wording.stop is not None:
                self.cancel()
                self._end("stop", self.sequence.finish("stop"))
        elif isinstance(event, Finished):
            self._show(self._wording.end(), last=True)
            self._end("stop" if self._wording.stop is not None else event.reason, event)
        else:
            self.fail(event.error)

    def fail(self, error: QrunError) -> None:
        """End the call with an error, unless it has ended already."""
        if not self.ended:
            self.ended = True
            self._tell(error)

    def _show(self, text: str, *, last: bool = False) -> None:
        if text or (last and self._tokens):
            self._tell(Piece(text, tuple(self._tokens)))
            self._tokens.clear()

    def _end(self, reason: FinishReason, finished: Finished) -> None:
        self.ended = True
        self._tell(
            Answer(
                self._wording.text,
                tuple(self._wording.token_ids),
                reason,
                finished.prompt_tokens,
                finished.reused_tokens,
                len(self._wording.token_ids),
                finished.prefill_seconds,
                finished.decode_seconds,
                self._wording.stop,
                finished.guessed_tokens,
                finished.accepted_tokens,
            )
        )

    def _tell(self, event: Event | Scored | QrunError) -> None:
        try:
            self._listener(event)
        except RuntimeError:  # the caller's event loop is closed: nobody listens any more
            self.ended = True
            self.cancel()
        except Exception:
            _log.exception("whoever has asked fails on an event of the answer")
            self.ended = True
            self.cancel()
