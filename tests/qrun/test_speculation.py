"""If these fail, guessing changes an answer, leaves wrong keys and values, or is tried where it loses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from qrun.backends.opening import open_session
from qrun.cli.main import main
from qrun.decoding.gains import StepCosts
from qrun.decoding.generate import Context, Event, Finished, Token, generate
from qrun.decoding.guesses import TextGuesses
from qrun.decoding.speculation import Speculation
from qrun.errors import QrunError
from qrun.sampling.params import SamplingParams
from tests.fakes import FakeSession, fake_manifest

QUOTED = [5, 9, 2, 7, 30, 31, 8, 4]

# How many tokens are guessed depends on what steps take, which no test may leave to the machine.
pytestmark = pytest.mark.usefixtures("even_steps")


def quoting(tokens: list[int]) -> int:
    """Says the same eight tokens over and over again."""
    return QUOTED[(QUOTED.index(tokens[-1]) + 1) % len(QUOTED)] if tokens[-1] in QUOTED else QUOTED[0]


def wandering(tokens: list[int]) -> int:
    """The same tokens come again and again, and something else follows each time."""
    return int(np.random.default_rng(len(tokens)).integers(0, 20))


def answer(session: FakeSession, params: SamplingParams, *, speculate: bool) -> tuple[list[Event], Context]:
    context = Context(session, speculate=speculate)
    return list(generate(context, [1, 2, *QUOTED], params)), context


def tokens_of(events: list[Event]) -> list[int]:
    return [event.token_id for event in events if isinstance(event, Token)]


def last(events: list[Event]) -> Finished:
    assert isinstance(events[-1], Finished)
    return events[-1]


# What is guessed.


def test_the_longest_match_is_continued() -> None:
    text = TextGuesses([1, 2, 3, 4, 9, 2, 3, 7, 1, 2, 3])
    assert text.guess(3) == ([4, 9, 2], 3)
    text.extend([7, 1, 2])
    assert text.guess(2) == ([3, 7], 5)


def test_the_end_of_a_text_is_no_match_of_itself() -> None:
    assert TextGuesses([1, 2]).guess(4) == ([], 0)
    assert TextGuesses([]).guess(4) == ([], 0)
    assert TextGuesses([3, 3, 3]).guess(4) == ([3], 2)


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 16))
def test_a_guess_stood_in_the_text_behind_the_same_tokens(ids: list[int], most: int) -> None:
    found, length = TextGuesses(ids).guess(most)
    assert (length >= 2) == bool(found)
    assert len(found) <= most
    if found:
        wanted = ids[len(ids) - length :] + found
        assert any(ids[at : at + len(wanted)] == wanted for at in range(len(ids)))


# What an answer is.


@pytest.mark.parametrize("rule", [quoting, wandering])
@pytest.mark.parametrize("end", [1, 2, 17, 60])
def test_an_answer_is_the_same_and_so_is_what_the_cache_holds(rule: object, end: int) -> None:
    params = SamplingParams(max_tokens=end)
    plain, before = answer(FakeSession(rule), params, speculate=False)  # type: ignore[arg-type]
    found, after = answer(FakeSession(rule), params, speculate=True)  # type: ignore[arg-type]
    assert tokens_of(found) == tokens_of(plain)
    assert last(found).reason == last(plain).reason
    assert after.token_ids == before.token_ids
    assert after.cache.length == before.cache.length == 10 + end - 1


def test_a_text_that_repeats_itself_takes_fewer_steps() -> None:
    session = FakeSession(quoting)
    events, _ = answer(session, SamplingParams(max_tokens=120), speculate=True)
    assert len(session.fed) < 45
    assert last(events).accepted_tokens > 80
    assert last(events).guessed_tokens >= last(events).accepted_tokens


def test_where_guesses_do_not_come_true_hardly_any_is_tried() -> None:
    events, _ = answer(FakeSession(wandering), SamplingParams(max_tokens=200), speculate=True)
    assert last(events).guessed_tokens <= 4


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_sampled_answers_with_penalties_and_ends_are_the_same(data: st.DataObject) -> None:
    table = data.draw(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3), min_size=10, max_size=10))

    def rule(tokens: list[int]) -> int:
        choices = table[tokens[-1] % 10]
        return choices[len(tokens) % len(choices)] + 5

    params = SamplingParams(
        max_tokens=data.draw(st.integers(1, 80)),
        temperature=data.draw(st.sampled_from([0.5, 3.0, 8.0])),
        do_sample=True,
        seed=data.draw(st.integers(0, 5)),
        repetition_penalty=data.draw(st.sampled_from([1.0, 1.3])),
        eos_token_ids=tuple(data.draw(st.sets(st.integers(5, 14), max_size=2))),
    )
    plain, before = answer(FakeSession(rule), params, speculate=False)
    found, after = answer(FakeSession(rule), params, speculate=True)
    assert tokens_of(found) == tokens_of(plain)
    assert last(found).reason == last(plain).reason
    assert after.token_ids == before.token_ids


def test_guesses_never_go_beyond_the_context() -> None:
    session = FakeSession(quoting, fake_manifest(context_length=40))
    events, context = answer(session, SamplingParams(), speculate=True)
    assert last(events).reason == "context"
    assert context.cache.length == 40
    assert len(tokens_of(events)) == 31


def test_an_error_in_a_step_of_several_tokens_ends_the_answer() -> None:
    session = FakeSession(quoting)
    real = session.forward

    def forward(token_ids, cache, logits="last"):
        if logits == "all":
            raise QrunError("no memory")
        return real(token_ids, cache, logits)

    session.forward = forward  # type: ignore[method-assign]
    with pytest.raises(QrunError, match="no memory"):
        answer(session, SamplingParams(max_tokens=60), speculate=True)


# Whether it is tried.


def test_the_cost_of_a_step_is_measured_and_estimated_where_it_is_not() -> None:
    costs = StepCosts()
    costs.took(1, 0.010)
    assert costs.of(3) == pytest.approx(1.5)
    costs.took(2, 0.030)
    assert costs.of(2) == pytest.approx(3)
    assert costs.of(4) == pytest.approx(7)  # in proportion to the longest that was measured
    for _ in range(40):
        costs.took(2, 0.011)
    assert costs.of(2) == pytest.approx(1.1, rel=0.05)


def test_steps_that_cost_more_than_they_gain_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a plan, which takes a pass for each position whose logits are asked for."""
    now = [0.0]
    session = FakeSession(quoting)
    real = session.forward

    def forward(token_ids, cache, logits="last"):
        now[0] += 0.01 * token_ids.shape[1] ** 1.5
        return real(token_ids, cache, logits)

    session.forward = forward  # type: ignore[method-assign]
    monkeypatch.setattr("qrun.decoding.scheduler.perf_counter", lambda: now[0])
    events, _ = answer(session, SamplingParams(max_tokens=200), speculate=True)
    assert last(events).guessed_tokens < 40
    assert tokens_of(events)[-8:] == tokens_of(events)[-16:-8]


# On real sessions.


@pytest.fixture(scope="module", params=["fp32", "int8", "int4"])
def folder(request: pytest.FixtureRequest, exporter: Callable[..., Path]) -> Path:
    return exporter(request.param, vocab_size=4096)


def test_real_sessions_choose_what_they_choose_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guesses are given, right and wrong ones: what is chosen may differ only where two tokens nearly tie."""
    session = open_session(folder)
    prompt = np.random.default_rng(1).integers(0, 4096, 40).tolist()
    params = SamplingParams(max_tokens=48, ignore_eos=True)
    plain = tokens_of(list(generate(Context(session), prompt, params)))

    def guess(self: Speculation, sequence: object) -> list[int]:
        done = len(sequence.token_ids)  # type: ignore[attr-defined]
        true = plain[done : done + min(5, 47 - done)]
        return true if done % 3 else [*true[:2], 17, 18][: 47 - done]

    monkeypatch.setattr(Speculation, "guess", guess)
    context = Context(session, speculate=True)
    events = list(generate(context, prompt, params))
    found = tokens_of(events)
    agreeing = next((at for at, pair in enumerate(zip(plain, found)) if pair[0] != pair[1]), len(plain))
    if agreeing < len(plain):
        logits = Context(session).feed([*prompt, *plain[:agreeing]], logits="last")
        assert logits[plain[agreeing]] - logits[found[agreeing]] < 0.1
    else:
        assert last(events).accepted_tokens > 24
    assert context.token_ids == [*prompt, *found[:-1]]


def test_the_commands_tell_what_came_true(folder: Path) -> None:
    asked = ["--engine", str(folder), "--speculate"]
    prompt = "abcabcabcabcabc"
    done = CliRunner().invoke(main, ["generate", *asked, "--prompt", prompt, "--raw", "--greedy", "--json"])
    assert done.exit_code == 0, done.output
    assert '"guessed_tokens"' in done.output
    done = CliRunner().invoke(main, ["bench", *asked, "-p", "8", "-n", "16", "-r", "1"])
    assert done.exit_code == 0, done.output
    assert "guessed in steps of several tokens" in done.output
    done = CliRunner().invoke(
        main, ["bench", *asked, "--rows", "2", "-p", "8", "-n", "16", "-r", "1", "--json"]
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["results"][0]["guessed_tokens"] >= 0
    done = CliRunner().invoke(
        main, ["chat", *asked, "--greedy", "--max-tokens", "8"], input="hello\n/stats\n"
    )
    assert done.exit_code == 0, done.output
    assert "came true" in done.output


def test_a_slow_first_step_of_a_kind_does_not_count() -> None:
    """It takes memory for its tensors; where it counted, guesses could be given up for good."""
    costs = StepCosts()
    for count, seconds in ((1, 0.030), (1, 0.010), (2, 0.050), (2, 0.012)):
        costs.took(count, seconds)
    assert costs.of(2) == pytest.approx(1.2)
