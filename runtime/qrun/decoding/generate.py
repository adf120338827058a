"""Generation for one sequence: one row, stepped until its answer has ended. Token ids only, no text."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Tokens

import numpy as np
from numpy.typing import NDArray

from qrun.backends.kvcache import KVCache
from qrun.backends.session import LogitsFor, Session
from qrun.decoding.draft import Draft
from qrun.decoding.scheduler import PREFILL_CHUNK, Scheduler
from qrun.decoding.sequence import (
    Failed,
    Finished,
    FinishReason,
    Prefilled,
    Scored,
    Sequence,
    Token,
    check_prompt,
)
from qrun.decoding.slots import Slots
from qrun.decoding.speculation import new_speculation
from qrun.sampling.constraint import Constraint
from qrun.sampling.params import SamplingParams

__all__ = [
    "PREFILL_CHUNK",
    "Context",
    "Event",
    "FinishReason",
    "Finished",
    "Prefilled",
    "Token",
    "check_prompt",
    "generate",
    "run",
]

Event = Prefilled | Token | Finished


class Context:
    """One row: a KV cache and the token ids whose keys and values it holds.

    Args:
        session: runs the model.
        speculate: try several tokens in one step where the text repeats itself.
        draft: a smaller model of the same vocabulary, whose guesses are tried in one step.

    Attributes:
        speculation: what was learnt about guesses and steps so far; None if none are tried.
    """

    def __init__(self, session: Session, *, speculate: bool = False, draft: Draft | None = None) -> None:
        self.session = session
        self.slots = Slots(session)
        self.speculation = new_speculation(session, draft, speculate=speculate)

    @property
    def cache(self) -> KVCache:
        return self.slots.cache

    @property
    def token_ids(self) -> list[int]:
        return self.slots.token_ids[0]

    def reuse(self, prompt_ids: Tokens[int]) -> int:
        """Keep what ``prompt_ids`` begins with and forget the rest; see ``Slots.keep``."""
        return self.slots.keep(0, prompt_ids)

    def feed(self, token_ids: Tokens[int], *, logits: LogitsFor) -> NDArray[np.float32]:
        """Append tokens; see ``Slots.feed``."""
        return self.slots.feed(0, token_ids, logits=logits)


def generate(
    context: Context,
    prompt_ids: Tokens[int],
    params: SamplingParams,
    *,
    chunk: int = PREFILL_CHUNK,
    constraint: Constraint | None = None,
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
        constraint: what the answer must fit.

    Raises:
        QrunError: see ``check_prompt``; or too little memory for the KV cache.
    """
    yield from run(context, Sequence(prompt_ids, params, context.cache.limit, constraint), chunk=chunk)


def run(context: Context, sequence: Sequence, *, chunk: int = PREFILL_CHUNK) -> Iterator[Event]:
    """Step one sequence to its end; see ``generate``."""
    scheduler = Scheduler(context.slots, chunk=chunk, grain=None, speculation=context.speculation)
    scheduler.add(sequence)
    while scheduler.busy:
        for _, event in scheduler.step():
            if isinstance(event, Failed):
                raise event.error
            assert not isinstance(event, Scored), "nothing was to be scored"
            yield event
