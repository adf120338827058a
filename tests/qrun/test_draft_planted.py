"""Faults of steps of several tokens, planted one by one: if one of these fails, tests would not see it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from qrun.decoding.draft import Drafting
from qrun.decoding.scheduler import Scheduler
from qrun.decoding.slots import Slots
from qrun.decoding.speculation import Speculation
from qrun.errors import QrunError
from qrun.sampling.params import SamplingParams
from tests.qrun.drafting import check_equal

Plant = Callable[[pytest.MonkeyPatch], None]
GREEDY = SamplingParams(max_tokens=120)
SAMPLED = SamplingParams(max_tokens=120, do_sample=True, temperature=8.0, seed=3)


def accepted_without_agreement(patch: pytest.MonkeyPatch) -> None:
    """The logits behind a guess are taken for the answer's own though it has chosen another token."""
    patch.setattr("qrun.decoding.scheduler._came_true", lambda guess, sequence: True)


def accepted_where_only_the_first_agrees(patch: pytest.MonkeyPatch) -> None:
    """All guesses of a step count as true if the first one is."""
    judged: dict[int, bool] = {}

    def came_true(guess: int, sequence) -> bool:
        key = sequence.guessed  # is another number in each step with guesses
        judged.setdefault(key, sequence.token_ids[-1] == guess)
        return judged[key]

    patch.setattr("qrun.decoding.scheduler._came_true", came_true)


def the_guess_replaces_the_choice(patch: pytest.MonkeyPatch) -> None:
    """What was guessed becomes part of the answer instead of what the model has chosen."""

    def came_true(guess: int, sequence) -> bool:
        sequence.token_ids[-1] = guess
        return True

    patch.setattr("qrun.decoding.scheduler._came_true", came_true)


def the_models_cache_is_not_cut_back(patch: pytest.MonkeyPatch) -> None:
    """Keys and values of guesses that did not come true stay where the answer goes on."""
    patch.setattr(Slots, "trim", lambda self, row, length: None)


def one_token_too_many_is_kept(patch: pytest.MonkeyPatch) -> None:
    """The cache is cut back behind the first wrong guess, and not before it."""
    real = Slots.trim

    def trim(self: Slots, row: int, length: int) -> None:
        real(self, row, min(length + 1, len(self.token_ids[row])) if length else 0)

    patch.setattr(Slots, "trim", trim)


def one_token_too_few_is_kept(patch: pytest.MonkeyPatch) -> None:
    """The cache loses the last guess that came true."""
    real = Slots.trim
    patch.setattr(Slots, "trim", lambda self, row, length: real(self, row, max(0, length - 1)))


def logits_of_the_place_before(patch: pytest.MonkeyPatch) -> None:
    """Each guess is judged by the logits of its own place, and not of the one before it."""
    real = Slots.feed

    def feed(self: Slots, row, token_ids, *, logits, whole=True):
        found = real(self, row, token_ids, logits=logits, whole=whole)
        return found[[0, *range(2, len(found)), len(found) - 1]] if logits == "all" else found

    patch.setattr(Slots, "feed", feed)


def the_generator_advances_with_each_guess(patch: pytest.MonkeyPatch) -> None:
    """A number is drawn for every guess, and not for every token of the answer."""
    real = Speculation.guess

    def guess(self: Speculation, sequence) -> list[int]:
        found = real(self, sequence)
        sequence._sampler._generator.random(len(found))
        return found

    patch.setattr(Speculation, "guess", guess)


def a_rejected_guess_draws_again(patch: pytest.MonkeyPatch) -> None:
    """A token is drawn anew where the guess was wrong, as if the first draw had not counted."""
    real = Scheduler._choose

    def choose(self: Scheduler, sequence, logits, events) -> bool:
        goes_on = real(self, sequence, logits, events)
        if sequence.token_ids and sequence.guessed > sequence.accepted and sequence.guessed % 2:
            sequence._sampler._generator.random()
        return goes_on

    patch.setattr(Scheduler, "_choose", choose)


def the_drafts_cache_is_not_cut_back(patch: pytest.MonkeyPatch) -> None:
    """The draft goes on behind its own wrong guesses: no answer changes, but nothing comes true any more."""
    real = Drafting._catch_up

    def catch_up(self: Drafting, sequence) -> list[int]:
        if self._agreed < 0:
            return real(self, sequence)
        total = len(sequence.prompt_ids) + len(sequence.token_ids)
        new, self._agreed = total - self._agreed, total
        return sequence.token_ids[-new:]

    patch.setattr(Drafting, "_catch_up", catch_up)


def the_draft_reads_only_the_last_token(patch: pytest.MonkeyPatch) -> None:
    """The draft misses tokens that the answer got without it."""
    real = Drafting._catch_up
    patch.setattr(Drafting, "_catch_up", lambda self, sequence: real(self, sequence)[-1:])


PLANTED: list[tuple[Plant, SamplingParams]] = [
    (accepted_without_agreement, GREEDY),
    (accepted_where_only_the_first_agrees, GREEDY),
    (the_guess_replaces_the_choice, GREEDY),
    (the_models_cache_is_not_cut_back, GREEDY),
    (one_token_too_many_is_kept, GREEDY),
    (one_token_too_few_is_kept, GREEDY),
    (logits_of_the_place_before, GREEDY),
    (the_generator_advances_with_each_guess, SAMPLED),
    (a_rejected_guess_draws_again, SAMPLED),
    (the_drafts_cache_is_not_cut_back, GREEDY),
    (the_draft_reads_only_the_last_token, GREEDY),
]


def check(params: SamplingParams) -> None:
    """The answer is the same, and a draft that is right at four places of five is heard."""
    found = check_equal(params, wrong_at=5)
    assert found.guessed > 80
    if not params.do_sample:
        assert found.accepted > 0.75 * found.guessed


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_without_a_fault_nothing_is_found(params: SamplingParams) -> None:
    check(params)


@pytest.mark.parametrize(("plant", "params"), PLANTED, ids=lambda each: getattr(each, "__name__", ""))
def test_a_planted_fault_is_found(
    monkeypatch: pytest.MonkeyPatch, plant: Plant, params: SamplingParams
) -> None:
    plant(monkeypatch)
    with pytest.raises((AssertionError, IndexError, ValueError, QrunError)):
        check(params)
