"""If these fail, a draft model changes an answer, guesses what it cannot, or costs more than it gains."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qrun.decoding.draft import Draft
from qrun.decoding.generate import Context, generate
from qrun.errors import QrunError
from qrun.sampling.params import SamplingParams
from tests.fakes import FakeSession, fake_manifest
from tests.qrun.drafting import PROMPT, check_equal, draft_of, eager, telling, told

# On sessions without a model, which answer by a rule over what their cache holds.


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_answers_are_the_same_sampled_penalised_and_ended_ones_too(data: st.DataObject) -> None:
    params = SamplingParams(
        max_tokens=data.draw(st.integers(1, 80)),
        temperature=data.draw(st.sampled_from([0.5, 3.0, 8.0])),
        do_sample=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 5)),
        repetition_penalty=data.draw(st.sampled_from([1.0, 1.3])),
        eos_token_ids=tuple(data.draw(st.sets(st.integers(0, 199), max_size=20))),
    )
    check_equal(params, wrong_at=data.draw(st.integers(1, 9)))


def test_what_was_wrong_is_forgotten_so_that_the_next_guesses_are_right_again() -> None:
    """The draft depends on all that it holds: with one wrong token left in it, nothing would come true."""
    found = check_equal(SamplingParams(max_tokens=120), wrong_at=5)
    assert found.accepted >= 80
    assert found.guessed > found.accepted


def test_a_good_draft_takes_fewer_steps() -> None:
    session = FakeSession(telling, fake_manifest(context_length=512))
    with eager():
        found = told(session, SamplingParams(max_tokens=100), Draft(FakeSession(telling, session.manifest)))
    assert found.accepted == found.guessed >= 75
    assert len(session.fed) < 30


def test_a_draft_of_a_shorter_context_guesses_as_long_as_it_fits() -> None:
    draft = FakeSession(telling, fake_manifest(context_length=40))
    with eager():
        found = told(FakeSession(telling, fake_manifest(context_length=200)), SamplingParams(), Draft(draft))
    assert found.reason == "context"
    assert len(found.tokens) == 200 - len(PROMPT) + 1
    assert 20 < found.accepted <= 36


def test_tokens_beyond_its_vocabulary_are_neither_guessed_nor_read() -> None:
    """Of the same tokenizer, one of two models may pad its logits further, and its sampler may draw there."""
    params = SamplingParams(max_tokens=20)
    manifest = fake_manifest()
    object.__setattr__(manifest.model, "vocab_size", 150)

    def rule(seen: list[int]) -> int:
        return 140 if len(seen) < 15 else 150

    draft = FakeSession(lambda seen: 160 if len(seen) % 3 == 0 else 140, manifest)
    with eager():
        found = told(FakeSession(rule), params, Draft(draft))
    assert found.tokens == told(FakeSession(rule), params).tokens
    assert max(found.tokens) == 150
    assert found.accepted > 2
    assert max(max(fed) for fed in draft.fed) < 150


def test_a_draft_that_fails_ends_no_answer(caplog: pytest.LogCaptureFixture) -> None:
    draft = FakeSession(telling)

    def forward(*_: object) -> Any:
        raise QrunError("no memory")

    draft.forward = forward  # type: ignore[method-assign]
    params = SamplingParams(max_tokens=30)
    with eager(), caplog.at_level(logging.WARNING, "qrun.engine"):
        found = told(FakeSession(telling), params, Draft(draft))
    assert found.tokens == told(FakeSession(telling), params).tokens
    assert caplog.messages == ["the draft model is given up: no memory"]


def test_the_next_turn_reads_only_what_is_new() -> None:
    manifest = fake_manifest(context_length=512)
    draft = FakeSession(draft_of(telling), manifest)
    context = Context(FakeSession(telling, manifest), draft=Draft(draft))
    with eager():
        list(generate(context, list(range(100, 180)), SamplingParams(max_tokens=20)))
        before = sum(map(len, draft.fed))
        list(generate(context, [*context.token_ids, 7, 8], SamplingParams(max_tokens=20)))
    assert sum(map(len, draft.fed)) - before < 60


class Clock:
    """Seconds that pass in steps of fake sessions only."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        for place in ("scheduler", "draft", "sequence"):
            patch.setattr(f"qrun.decoding.{place}.perf_counter", lambda: self.now)

    def timed(self, session: FakeSession, seconds: float) -> FakeSession:
        """Its steps take ``seconds``, and a quarter more for each further token, up to 16 times as much."""
        real = session.forward

        def forward(token_ids, cache, logits="last"):
            self.now += seconds * min(16, 1 + 0.25 * (token_ids.shape[1] - 1))
            return real(token_ids, cache, logits)

        session.forward = forward  # type: ignore[method-assign]
        return session


@pytest.mark.parametrize(
    ("wrong_at", "seconds", "least", "most"),
    [
        pytest.param(10_000, 0.001, 0.0, 0.5, id="always right, a tenth of the time"),
        pytest.param(8, 0.002, 0.0, 0.8, id="mostly right, a fifth of the time"),
        pytest.param(1, 0.001, 1.0, 1.06, id="never right"),
        pytest.param(10_000, 0.010, 0.9, 1.06, id="always right, and as slow as the model"),
        pytest.param(2, 0.004, 0.9, 1.06, id="half right, and not much faster"),
    ],
)
def test_a_good_draft_gains_and_a_bad_one_costs_little(
    monkeypatch: pytest.MonkeyPatch, wrong_at: int, seconds: float, least: float, most: float
) -> None:
    """Time of an answer of 600 tokens, in times of the same without a draft; by a clock of the test's own."""
    manifest = fake_manifest(context_length=1024)
    clock, params = Clock(monkeypatch), SamplingParams(max_tokens=600)
    told(clock.timed(FakeSession(telling, manifest), 0.010), params)
    alone, clock.now = clock.now, 0.0
    draft = FakeSession(draft_of(telling, wrong_at=wrong_at), manifest)
    told(clock.timed(FakeSession(telling, manifest), 0.010), params, Draft(clock.timed(draft, seconds)))
    assert least <= clock.now / alone <= most
