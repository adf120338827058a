"""Answers with and without a draft model, and what both must have in common."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from qrun.decoding.draft import Draft
from qrun.decoding.generate import Context, Finished, Token, generate
from qrun.sampling.params import SamplingParams
from tests.fakes import FakeSession, Rule, fake_manifest

PROMPT = [1, 2, 5, 9, 2]


@contextmanager
def eager(most: int = 4) -> Iterator[None]:
    """Guesses are tried whether they pay or not: tiny models have no time to win."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "qrun.decoding.draft.worth", lambda share, available, costs, each=0.0: min(most, available)
        )
        yield


def telling(seen: list[int]) -> int:
    """A next token that depends on all tokens so far, so that one wrong token in the cache changes it."""
    return (sum((place + 3) * token for place, token in enumerate(seen)) * 7 + len(seen)) % 200


def draft_of(rule: Rule, *, wrong_at: int = 3) -> Rule:
    """Guesses what a rule says but at each place that ``wrong_at`` divides; there it says token 201."""
    return lambda seen: 201 if len(seen) % wrong_at == 0 else rule(seen)


@dataclass(frozen=True)
class Told:
    """One answer: its tokens and end, what the cache holds behind it, and how it came."""

    tokens: list[int]
    reason: str
    held: list[int]
    length: int
    guessed: int
    accepted: int


def told(session: FakeSession, params: SamplingParams, draft: Draft | None = None) -> Told:
    context = Context(session, draft=draft)
    *events, last = generate(context, PROMPT, params)
    assert isinstance(last, Finished)
    tokens = [event.token_id for event in events if isinstance(event, Token)]
    held = list(context.token_ids), context.cache.length
    return Told(tokens, last.reason, *held, last.guessed_tokens, last.accepted_tokens)


def check_equal(params: SamplingParams, *, wrong_at: int = 3) -> Told:
    """An answer to ``telling`` is the same with a draft that is wrong now and then; returns the latter.

    Raises:
        AssertionError: it is not; or the draft did not come to guess what it could have guessed.
    """
    manifest = fake_manifest(context_length=512)
    plain = told(FakeSession(telling, manifest), params)
    with eager():
        draft = Draft(FakeSession(draft_of(telling, wrong_at=wrong_at), manifest))
        found = told(FakeSession(telling, manifest), params, draft)
    assert (found.tokens, found.reason) == (plain.tokens, plain.reason)
    assert (found.held, found.length) == (plain.held, plain.length)
    return found
