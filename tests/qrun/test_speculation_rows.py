"""If these fail, guesses in several rows change answers, leave wrong keys and values, or cost time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qrun.backends.opening import open_session
from qrun.decoding.gains import StepCosts, worth_apart
from qrun.decoding.scheduler import Scheduler
from qrun.decoding.sequence import Failed, Finished, Sequence
from qrun.decoding.slots import Slots
from qrun.decoding.speculation import Speculation
from qrun.errors import QrunError
from qrun.sampling.params import SamplingParams
from tests.fakes import FakeSession, fake_manifest
from tests.qrun.drafting import telling
from tests.qrun.interleaving import Request, requests
from tests.qrun.speculating import Knowing, check_equal, eager, known_answers, together

QUOTED = [5, 9, 2, 7, 30, 31, 8, 4]
TRIED = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

# How many tokens are guessed depends on what steps take, which no test may leave to the machine.
pytestmark = pytest.mark.usefixtures("even_steps")


def quoting_or_prose(seen: list[int]) -> int:
    """Behind a prompt that begins with 1 the same eight tokens over and over; behind others no repetition."""
    if seen[0] == 1:
        return QUOTED[(QUOTED.index(seen[-1]) + 1) % len(QUOTED)] if seen[-1] in QUOTED else QUOTED[0]
    return telling(seen)


def asked(*firsts: int, tokens: int = 60, **params: object) -> list[Request]:
    return [
        Request((first, 40 + row, *QUOTED), SamplingParams(max_tokens=tokens + row, **params), 0)  # type: ignore[arg-type]
        for row, first in enumerate(firsts)
    ]


# What an answer is.


@TRIED
@given(data=st.data(), rows=st.integers(2, 4), wrong_at=st.integers(1, 7))
def test_any_rows_with_any_guesses_get_what_they_get_without(data, rows, wrong_at):
    """Rows of differing numbers of tokens; sampled, penalised, constrained, scored, cancelled answers."""
    session = FakeSession(telling, fake_manifest(context_length=512))
    many = data.draw(requests(200, most_tokens=40))
    for last_apart in (False, True):
        session.last_apart = last_apart
        check_equal(session, many, rows, Knowing(known_answers(session, many), wrong_at))


@TRIED
@given(data=st.data(), rows=st.integers(2, 4))
def test_any_rows_with_guesses_from_texts_get_what_they_get_without(data, rows):
    session = FakeSession(quoting_or_prose, fake_manifest(context_length=512))
    with eager():
        check_equal(session, data.draw(requests(12, most_tokens=40)), rows, Speculation(past_tokens=300))


@pytest.mark.parametrize("rows", [2, 4])
def test_what_rows_hold_behind_their_answers_is_what_they_hold_without(rows: int) -> None:
    session = FakeSession(quoting_or_prose, fake_manifest(context_length=512))
    prompts = [[1 + row % 2, 40 + row, *QUOTED] for row in range(rows)]
    params = SamplingParams(max_tokens=50)
    plain, before, _ = together(session, prompts, params, None)
    with eager():
        found, after, _ = together(session, prompts, params, Speculation())
    assert found == plain

    def texts(slots: Slots) -> list[list[int]]:
        return sorted(held for held in slots.token_ids if held)

    assert all(held in [[*p, *a[:-1]] for p, a in zip(prompts, plain)] for held in texts(after))
    assert all(held in [[*p, *a[:-1]] for p, a in zip(prompts, plain)] for held in texts(before))


def test_a_row_that_ends_within_its_guesses_leaves_the_others_alone() -> None:
    """By an end token, by its budget and by the context, in one step with others that go on."""
    session = FakeSession(quoting_or_prose, fake_manifest(context_length=64))
    many = [
        *asked(1, 1, tokens=9),
        *asked(1, tokens=100),
        *asked(1, 2, tokens=40, eos_token_ids=(QUOTED[6],)),
    ]
    for rows in (2, 4):
        speculation = Knowing(known_answers(session, many), 1000)
        found = check_equal(session, many, rows, speculation)
        assert {each.last.reason for each in found if isinstance(each.last, Finished)} >= {"length", "eos"}
        assert speculation.accepted == 0 or speculation.guessed > 0
        assert sum(each.last.accepted_tokens for each in found if isinstance(each.last, Finished)) > 5


def test_an_error_in_one_row_is_none_of_the_others() -> None:
    session = FakeSession(quoting_or_prose, fake_manifest(context_length=512))
    slots = Slots(session, 2)
    real, failed = Slots.feed, list[int]()

    def feed(row, token_ids, *, logits, whole=True):
        if row == 0 and logits == "all" and not failed:  # later the other answer has this row
            failed.append(row)
            raise QrunError("no memory")
        return real(slots, row, token_ids, logits=logits, whole=whole)

    slots.feed = feed  # type: ignore[method-assign]
    with eager():
        scheduler = Scheduler(slots, speculation=Speculation(), prompts_first=True)
        both = [Sequence([1, 40 + row, *QUOTED], SamplingParams(max_tokens=40), 512) for row in range(2)]
        for each in both:
            scheduler.add(each)
        ends = {}
        while scheduler.busy:
            for sequence, event in scheduler.step():
                if isinstance(event, Failed | Finished):
                    ends[id(sequence)] = event
    assert isinstance(ends[id(both[0])], Failed)
    assert isinstance(ends[id(both[1])], Finished)
    assert len(both[1].token_ids) == 40


# On real sessions: in fp32 a row's bits depend neither on the other rows nor on how many tokens it is given.


@pytest.fixture(scope="module", params=["fp32", "fp32, 8-bit cache"])
def exact(request: pytest.FixtureRequest, exporter: Callable[..., Path]) -> object:
    folder = exporter(
        "fp32", int8_kv_cache="8-bit" in request.param, vocab_size=4096, max_position_embeddings=256
    )
    return open_session(folder, threads=2)


@pytest.mark.parametrize("rows", [2, 4])
@TRIED
@given(data=st.data(), wrong_at=st.integers(2, 7))
def test_real_rows_get_what_they_get_without(exact, rows, data, wrong_at):
    many = data.draw(requests(4096, most_tokens=30))
    check_equal(exact, many, rows, Knowing(known_answers(exact, many), wrong_at))


@pytest.mark.parametrize("rows", [2, 4])
def test_real_rows_guess_from_past_answers(exact, rows):
    """The second time each answer is known from the first, sampled ones too."""
    numbers = np.random.default_rng(3)
    many = [
        Request(
            tuple(numbers.integers(0, 4096, 12).tolist()),
            SamplingParams(max_tokens=60, ignore_eos=True, do_sample=row % 2 == 1, temperature=1.0, seed=row),
            0,
        )
        for row in range(rows)
    ]
    speculation = Speculation(past_tokens=500)
    with eager():
        check_equal(exact, many, rows, speculation)
        before = speculation.accepted
        check_equal(exact, many, rows, speculation)
    assert speculation.accepted > before + 25 * rows


# Whether it is tried.


def costs(**seconds: float) -> StepCosts:
    """As on the EPYC: 2 and 4 rows of one token, and one row of 4 and of 8 tokens."""
    found = StepCosts()
    for count, took in ((1, 1.0), (4, 1.63), (8, 2.4)):
        found.took(count, took)
    for rows, took in ((2, 1.09), (4, 1.48)):
        found.took_together(rows, took)
    return found


def test_rows_that_all_quote_are_tried_apart() -> None:
    assert min(worth_apart([(0.95, 15), (0.95, 15)], costs())) >= 5
    assert min(worth_apart([(0.99, 15)] * 4, costs())) >= 7
    assert worth_apart([(0.99, 15), (0.99, 2)], costs())[1] <= 2


@pytest.mark.parametrize("other", [(0.0, 15), (0.2, 15), (0.95, 0)])
def test_a_row_that_would_wait_for_the_others_keeps_all_together(other: tuple[float, int]) -> None:
    """One that quotes beside one that does not: the second would get a token in twice the time."""
    assert worth_apart([(0.99, 15), other], costs()) == [0, 0]


def test_nothing_is_tried_before_a_step_of_so_many_rows_was_measured() -> None:
    assert worth_apart([(0.99, 15)] * 3, costs()) == [0, 0, 0]
    assert worth_apart([(0.99, 15)] * 2, StepCosts()) == [0, 0]


def test_where_no_row_has_decoded_alone_its_step_follows_from_that_of_several() -> None:
    found = StepCosts()
    found.took_together(2, 0.010)
    assert found.apart(2, 1) == pytest.approx(1 / 1.15)
    found.took(4, 0.016)
    assert found.apart(2, 4) == pytest.approx(1.6)


def test_rows_that_quote_take_fewer_steps_and_prose_takes_none_of_several() -> None:
    session = FakeSession(quoting_or_prose, fake_manifest(context_length=512))
    params = SamplingParams(max_tokens=120)

    def run(*firsts: int) -> tuple[int, Speculation]:
        speculation = Speculation()
        answers, _, steps = together(
            session, [[first, 40 + row, *QUOTED] for row, first in enumerate(firsts)], params, speculation
        )
        assert all(len(answer) == 120 for answer in answers)
        return steps, speculation

    steps, quoted = run(1, 1)
    assert steps < 70
    assert quoted.accepted > 100
    steps, prose = run(2, 3)
    assert prose.guessed <= 8
    # While both decode the one that quotes waits for nobody; once it is alone it goes on with guesses.
    _, mixed = run(1, 2)
    assert mixed.guessed <= 8


def test_no_prompt_waits_for_steps_of_all_rows() -> None:
    session = FakeSession(quoting_or_prose, fake_manifest(context_length=512))
    scheduler = Scheduler(Slots(session, 3), chunk=8, grain=4, speculation=Speculation())
    for row in range(2):
        scheduler.add(Sequence([1, 40 + row, *QUOTED], SamplingParams(max_tokens=300), 512))
    for _ in range(40):
        scheduler.step()
    session.fed.clear()
    scheduler.add(Sequence([3] * 64, SamplingParams(max_tokens=2), 512))
    scheduler.step()  # takes it up, and reads its first piece
    while scheduler._reading is not None:
        session.fed.clear()
        scheduler.step()
        assert session.fed[:2] == [each for each in session.fed[:2] if len(each) == 1]
