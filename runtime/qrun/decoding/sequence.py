"""One answer in progress, as explicit state: it is given logits and returns events.

A sequence knows token ids only, and nothing of batches, caches or models.
"""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qrun.decoding.pieces import Pieces
from qrun.errors import QrunError
from qrun.sampling.constraint import Constraint
from qrun.sampling.params import SamplingParams
from qrun.sampling.sampler import Logprobs, Sampler, logprobs

FinishReason = Literal["eos", "length", "context", "stop", "time", "cancelled"]


@dataclass(frozen=True, slots=True)
class Prefilled:
    """Part of the prompt is in the cache: ``done`` of ``total`` tokens.

    The first one comes before any work, and its ``done`` are the tokens that were in the cache already.
    """

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token. An end token is not reported; it shows in ``Finished.reason``.

    ``logprobs`` is there where ``SamplingParams.logprobs`` asks for it.
    """

    token_id: int
    logprobs: Logprobs | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event. Times are in seconds; ``prefill_seconds`` ends with the first logits.

    ``reused_tokens`` of the ``prompt_tokens`` were in the KV cache already. ``guessed_tokens`` were tried in
    steps of several tokens, and ``accepted_tokens`` of them are part of the answer.
    """

    reason: FinishReason
    prompt_tokens: int
    reused_tokens: int
    completion_tokens: int
    prefill_seconds: float
    decode_seconds: float
    guessed_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Failed:
    """The last event of a sequence that could not go on."""

    error: QrunError


@dataclass(frozen=True, slots=True)
class Scored:
    """The next tokens of the prompt, with their log-probabilities; its first token has none."""

    tokens: tuple[Token, ...]


Event = Prefilled | Token | Scored | Finished | Failed


@dataclass(frozen=True, slots=True)
class Scoring:
    """What is wanted of a prompt beside its continuation.

    Attributes:
        count: report the prompt's own tokens with their log-probabilities, and so many likeliest ones at each
            place; None reports none.
        generate: False ends the answer where the prompt has been read.
    """

    count: int | None = None
    generate: bool = True


def check_prompt(prompt_ids: Tokens[int], context_length: int) -> None:
    """Refuse a prompt that cannot be run.

    Raises:
        QrunError: an empty prompt, or one that is longer than the context.
    """
    if not len(prompt_ids):
        raise QrunError("the prompt is empty: there is nothing to continue", hint="give some text")
    if len(prompt_ids) > context_length:
        raise QrunError(
            f"the prompt has {len(prompt_ids):,} tokens, the model's context is {context_length:,}",
            hint="shorten the prompt, or start over with /reset in a chat",
        )


class Sequence:
    """A prompt and what has been generated for it so far.

    Attributes:
        prompt_ids: the whole prompt, earlier turns included.
        token_ids: what was generated; an end token is not among them.
        read: tokens of the prompt that are in the cache.
        finish_reason: None until the answer has come to its end.
        cancelled: whether somebody has asked it to end.
        ends: the tokens that end it.
        guessed, accepted: tokens that were tried in steps of several tokens, and those that came true.

    Args:
        prompt_ids: token ids.
        params: how to sample and when to stop.
        context_length: of the model.
        constraint: what the answer must fit, at its beginning.
        scoring: what is wanted of the prompt itself.

    Raises:
        QrunError: see ``check_prompt``; or ignore_eos for an answer that ends where it is complete.
    """

    def __init__(
        self,
        prompt_ids: Tokens[int],
        params: SamplingParams,
        context_length: int,
        constraint: Constraint | None = None,
        scoring: Scoring | None = None,
    ) -> None:
        check_prompt(prompt_ids, context_length)
        if constraint is not None and params.ignore_eos:
            raise QrunError("ignore_eos contradicts a form: such an answer ends where it is complete")
        self.prompt_ids = list(prompt_ids)
        self.token_ids: list[int] = []
        self.read = 0
        self.finish_reason: FinishReason | None = None
        self.cancelled = False
        self.guessed = self.accepted = 0
        self._params = params
        self._constraint = constraint
        self._sampler: Sampler | None = None
        self.ends = frozenset() if params.ignore_eos else frozenset(params.eos_token_ids)
        room = context_length - len(prompt_ids) + 1  # the last token is sampled, and not fed
        self._budget = room if params.max_tokens is None else min(params.max_tokens, room)
        self._at_budget: FinishReason = "context" if self._budget == room else "length"
        self._scores = None if scoring is None else scoring.count
        if scoring is not None and not scoring.generate:
            self._budget, self._at_budget = 0, "length"
        self._reused = 0
        self._started = self._prefilled = perf_counter()

    def cancel(self) -> None:
        """End the answer after the step that is running. A signal handler or another thread may call this."""
        self.cancelled = True

    def begin(self, reused: int) -> Prefilled:
        """The prompt is about to be read; ``reused`` of its tokens are in the cache already."""
        self._started = self._prefilled = perf_counter()
        self.read = self._reused = reused
        return Prefilled(reused, len(self.prompt_ids))

    def next_piece(self, pieces: Pieces) -> list[int]:
        """The tokens of the prompt that are to be read next: up to the next cut.

        So a prompt is always cut at the same places, whatever else runs and wherever reading begins.
        """
        return self.prompt_ids[self.read : pieces.end(self.read, len(self.prompt_ids))]

    @property
    def next_id(self) -> int:
        """The token that is fed in the next step: the last one chosen, before that the prompt's last."""
        return self.token_ids[-1] if self.token_ids else self.prompt_ids[-1]

    @property
    def room(self) -> int:
        """How many more tokens the answer may have."""
        return self._budget - len(self.token_ids)

    @property
    def is_read(self) -> bool:
        """Whether all of the prompt is in the cache."""
        return self.read == len(self.prompt_ids)

    @property
    def is_scored(self) -> bool:
        """Whether the logits at every place of the prompt are wanted, so that no part of it can be reused."""
        return self._scores is not None

    def score(self, logits: NDArray[np.float32]) -> Scored:
        """Log-probabilities of prompt tokens, from the logits ``[piece, vocab]`` of the piece being read.

        Call it before ``advance``. A row of logits is about the token after its own.
        """
        assert self._scores is not None
        tokens = [] if self.read else [Token(self.prompt_ids[0])]
        for row, token_id in zip(logits, self.prompt_ids[self.read + 1 :]):
            tokens.append(Token(token_id, logprobs(row, token_id, self._scores)))
        return Scored(tuple(tokens))

    def advance(self, count: int) -> Prefilled:
        """``count`` more tokens of the prompt are in the cache."""
        self.read += count
        self._prefilled = perf_counter()
        return Prefilled(self.read, len(self.prompt_ids))

    def choose(self, logits: NDArray[np.float32]) -> list[Event]:
        """Take the next token from logits ``[vocab]``; the events say which, and whether it was the last.

        Raises:
            QrunError: logits from which no token can be chosen.
        """
        if self.cancelled:
            return [self.finish("cancelled")]
        if len(self.token_ids) == self._budget:
            return [self.finish(self._at_budget)]
        if self._sampler is None:
            self._sampler = Sampler(self._params, self.prompt_ids)
        # The constraint comes before biases and penalties, so that they cannot bring back what it rules out.
        masked = logits if self._constraint is None else self._constraint.mask(logits, self.ends)
        token_id = self._sampler.sample(masked)
        if token_id in self.ends:
            return [self.finish("eos")]
        if self._constraint is not None:
            self._constraint.accept(token_id)
        self.token_ids.append(token_id)
        count = self._params.logprobs
        token = Token(token_id, None if count is None else logprobs(logits, token_id, count))
        if self._constraint is not None and self._constraint.over:
            return [token, self.finish("eos")]  # only an end token could follow: no step is spent on it
        if len(self.token_ids) < self._budget:
            return [token]
        return [token, self.finish(self._at_budget)]

    def finish(self, reason: FinishReason) -> Finished:
        """End the sequence for a reason; returns its last event."""
        self.finish_reason = reason
        return Finished(
            reason,
            len(self.prompt_ids),
            self._reused,
            len(self.token_ids),
            self._prefilled - self._started,
            perf_counter() - self._prefilled,
            self.guessed,
            self.accepted,
        )
