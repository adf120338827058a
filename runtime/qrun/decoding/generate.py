"""The loop: prefill the prompt, then sample, feed, repeat. Token ids only; it has never heard of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qrun.backends.session import LogitsFor, Session
from qrun.errors import QrunError
from qrun.sampling.sampler import Sampler, SamplingParams

# Longer pieces are no faster, and the memory for activations grows with them.
PREFILL_CHUNK = 256

FinishReason = Literal["eos", "length", "context", "stop", "cancelled"]


class Context:
    """A KV cache and the token ids whose keys and values it holds (one sequence)."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.cache = session.new_cache()
        self.token_ids: list[int] = []

    def reuse(self, prompt_ids: Sequence[int]) -> int:
        """Keep what ``prompt_ids`` begins with and forget the rest; returns the tokens kept.

        At least one token is left to be fed, since only a fed token has logits.
        """
        kept = 0
        for cached, wanted in zip(self.token_ids, prompt_ids[:-1]):
            if cached != wanted:
                break
            kept += 1
        self.cache.trim(kept)
        del self.token_ids[kept:]
        return kept

    def feed(self, token_ids: Sequence[int], *, logits: LogitsFor) -> NDArray[np.float32]:
        """Append tokens; float32 logits ``[vocab]`` of the last one, or an empty array for "none"."""
        output = self.session.forward(np.asarray(token_ids, dtype=np.int64)[None], self.cache, logits)
        self.token_ids.extend(token_ids)
        last: NDArray[np.float32] = output[0, -1] if logits == "last" else output[0]
        return last


@dataclass(frozen=True, slots=True)
class Prefilled:
    """Part of the prompt is in the cache: ``done`` of ``total`` tokens.

    The first one comes before any work, and its ``done`` are the tokens that were in the cache already.
    """

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token. An end token is not reported; it shows in ``Finished.reason``."""

    token_id: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event. Times are in seconds; ``prefill_seconds`` ends with the first logits.

    ``reused_tokens`` of the ``prompt_tokens`` were in the KV cache already.
    """

    reason: FinishReason
    prompt_tokens: int
    reused_tokens: int
    completion_tokens: int
    prefill_seconds: float
    decode_seconds: float


Event = Prefilled | Token | Finished


def check_prompt(prompt_ids: Sequence[int], context_length: int) -> None:
    """Refuse a prompt that cannot be run.

    Raises:
        QrunError: an empty prompt, or one that is longer than the context.
    """
    if not prompt_ids:
        raise QrunError("the prompt is empty: there is nothing to continue", hint="give some text")
    if len(prompt_ids) > context_length:
        raise QrunError(
            f"the prompt has {len(prompt_ids):,} tokens, the model's context is {context_length:,}",
            hint="shorten the prompt, or start over with /reset in a chat",
        )


def generate(
    context: Context,
    prompt_ids: Sequence[int],
    params: SamplingParams,
    *,
    chunk: int = PREFILL_CHUNK,
) -> Iterator[Event]:
    """Continue a prompt token by token.

    Close the generator to stop early. The context then holds the prompt and every token that was
    fed; the last token of an answer is never fed. A later prompt that begins with the same tokens
    (the next turn of a chat) is prefilled from where it differs.

    Args:
        context: where the tokens go; reused as far as it agrees with the prompt.
        prompt_ids: the whole prompt, earlier turns included.
        params: how to sample and when to stop.
        chunk: tokens that are prefilled at once.

    Raises:
        QrunError: see ``check_prompt``; or too little memory for the KV cache.
    """
    limit = context.cache.limit
    check_prompt(prompt_ids, limit)
    started = perf_counter()
    reused = context.reuse(prompt_ids)
    yield Prefilled(reused, len(prompt_ids))
    logits = np.empty(0, dtype=np.float32)
    for start in range(reused, len(prompt_ids), chunk):
        piece = prompt_ids[start : start + chunk]
        done = start + len(piece)
        logits = context.feed(piece, logits="last" if done == len(prompt_ids) else "none")
        yield Prefilled(done, len(prompt_ids))
    prefilled = perf_counter()

    sampler = Sampler(params, prompt_ids)
    room = limit - len(prompt_ids) + 1  # the last token is sampled, and not fed
    budget = room if params.max_tokens is None else min(params.max_tokens, room)
    reason: FinishReason = "context" if budget == room else "length"
    end_tokens = frozenset() if params.ignore_eos else frozenset(params.eos_token_ids)
    completed = 0
    while completed < budget:
        token_id = sampler.sample(logits)
        if token_id in end_tokens:
            reason = "eos"
            break
        completed += 1
        yield Token(token_id)
        if completed < budget:
            logits = context.feed([token_id], logits="last")
    yield Finished(
        reason, len(prompt_ids), reused, completed, prefilled - started, perf_counter() - prefilled
    )
