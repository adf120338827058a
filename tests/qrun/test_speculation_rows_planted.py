"""Faults of guesses in several rows, planted one by one: if one of these fails, tests would not see it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from qrun.decoding.slots import Slots
from qrun.errors import QrunError
from qrun.sampling.params import SamplingParams
from tests.fakes import FakeSession, fake_manifest
from tests.qrun.drafting import telling
from tests.qrun.interleaving import Request
from tests.qrun.speculating import Knowing, check_equal, known_answers

Plant = Callable[[pytest.MonkeyPatch], None]


def accepted_without_agreement_in_another_row(patch: pytest.MonkeyPatch) -> None:
    """Guesses of the first row are judged, those of the others are believed."""
    patch.setattr(
        "qrun.decoding.scheduler._came_true",
        lambda guess, sequence: sequence.prompt_ids[0] != 1 or sequence.token_ids[-1] == guess,
    )


def one_row_is_not_cut_back(patch: pytest.MonkeyPatch) -> None:
    """Keys and values of guesses that did not come true stay in the second row."""
    real = Slots.trim
    patch.setattr(Slots, "trim", lambda self, row, length: (row == 1 and length) or real(self, row, length))


def the_first_row_is_cut_back_for_all(patch: pytest.MonkeyPatch) -> None:
    """What did not come true in a row is cut off in the first one."""
    real = Slots.trim
    patch.setattr(Slots, "trim", lambda self, row, length: real(self, 0, min(length, len(self.token_ids[0]))))


def logits_of_the_row_before(patch: pytest.MonkeyPatch) -> None:
    """Each row is told the logits of the row that was fed before it."""
    real, before = Slots.feed, {}

    def feed(self: Slots, row, token_ids, *, logits, whole=True):
        found = real(self, row, token_ids, logits=logits, whole=whole)
        if logits != "all":
            return found
        found, before[0] = before.get(0, found), found
        return found

    patch.setattr(Slots, "feed", feed)


def the_guesses_of_the_next_row(patch: pytest.MonkeyPatch) -> None:
    """No answer changes when rows exchange their guesses, but they do not come true any more."""
    real = Knowing.guess_apart
    patch.setattr(Knowing, "guess_apart", lambda self, rows: [*real(self, rows)[1:], *real(self, rows)[:1]])


def check(rows: int) -> None:
    """Answers are the same, and guesses that are right at four places of five are heard."""
    session = FakeSession(telling, fake_manifest(context_length=512))
    many = [
        Request((1 + row, 5, 9, 2), SamplingParams(max_tokens=80, do_sample=row == 3, seed=row), 0)
        for row in range(rows)
    ]
    speculation = Knowing(known_answers(session, many))
    check_equal(session, many, rows, speculation)
    assert speculation.guessed > 60 * rows / 2
    assert speculation.accepted > 0.5 * speculation.guessed


@pytest.mark.parametrize("rows", [2, 4])
def test_without_a_fault_nothing_is_found(rows: int) -> None:
    check(rows)


@pytest.mark.parametrize("rows", [2, 4])
@pytest.mark.parametrize(
    "plant",
    [
        accepted_without_agreement_in_another_row,
        one_row_is_not_cut_back,
        the_first_row_is_cut_back_for_all,
        logits_of_the_row_before,
        the_guesses_of_the_next_row,
    ],
)
def test_a_planted_fault_is_found(monkeypatch: pytest.MonkeyPatch, plant: Plant, rows: int) -> None:
    plant(monkeypatch)
    with pytest.raises((AssertionError, IndexError, ValueError, QrunError)):
        check(rows)
