"""If these fail, the loop feeds the wrong tokens, forgets to end, or misreports what it did."""

from __future__ import annotations

import pytest

from qrun.decoding.generate import Context, Finished, Prefilled, Token, generate
from qrun.errors import QrunError
from qrun.sampling.params import SamplingParams
from tests.fakes import FakeSession, fake_manifest

END = 9


def counting(seen: list[int]) -> int:
    """Each token is the one before it plus one, so the answer shows what the cache held."""
    return seen[-1] + 1


def run(context: Context, prompt: list[int], *, chunk: int = 256, **params):
    events = list(generate(context, prompt, SamplingParams(**params), chunk=chunk))
    tokens = [event.token_id for event in events if isinstance(event, Token)]
    assert isinstance(events[-1], Finished)
    return tokens, events[-1], events


def test_an_end_token_ends_the_answer_and_is_not_part_of_it():
    context = Context(FakeSession(counting))
    tokens, finished, _ = run(context, [5, 6], eos_token_ids=(30, END))
    assert tokens == [7, 8]
    assert (finished.reason, finished.prompt_tokens, finished.completion_tokens) == ("eos", 2, 2)


def test_end_tokens_can_be_ignored():
    tokens, finished, _ = run(
        Context(FakeSession(counting)), [5], eos_token_ids=(7,), ignore_eos=True, max_tokens=4
    )
    assert tokens == [6, 7, 8, 9]
    assert finished.reason == "length"


def test_the_last_token_is_not_fed_because_its_logits_would_be_thrown_away():
    session = FakeSession(counting)
    run(Context(session), [1, 2], max_tokens=3)
    assert session.fed == [[1, 2], [3], [4]]


def test_a_long_prompt_goes_through_in_chunks_and_only_the_last_has_logits():
    session = FakeSession(counting)
    _, _, events = run(Context(session), list(range(10)), chunk=4, max_tokens=1)
    assert session.fed == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [(event.done, event.total) for event in events if isinstance(event, Prefilled)] == [
        (0, 10),
        (4, 10),
        (8, 10),
        (10, 10),
    ]


def test_the_common_beginning_of_two_prompts_is_computed_once():
    session = FakeSession(counting)
    context = Context(session)
    run(context, [1, 2, 3, 4], max_tokens=1)
    session.fed.clear()
    tokens, finished, events = run(context, [1, 2, 3, 50, 60], max_tokens=2)
    assert session.fed == [[50, 60], [61]]
    assert tokens == [61, 62]
    assert finished.reused_tokens == 3
    assert events[0] == Prefilled(3, 5)


def test_a_prompt_that_is_wholly_cached_feeds_its_last_token_again_for_its_logits():
    session = FakeSession(counting)
    context = Context(session)
    run(context, [1, 2, 3], max_tokens=1)
    session.fed.clear()
    tokens, finished, _ = run(context, [1, 2, 3], max_tokens=1)
    assert (session.fed, tokens, finished.reused_tokens) == ([[3]], [4], 2)


def test_a_loop_that_was_left_keeps_what_was_fed_for_the_next_prompt():
    session = FakeSession(counting)
    context = Context(session)
    events = generate(context, [1, 2], SamplingParams(max_tokens=50))
    for event in events:
        if event == Token(5):
            break
    events.close()
    session.fed.clear()
    _, finished, _ = run(context, [1, 2, 3, 4, 5, 99], max_tokens=1)
    assert (session.fed, finished.reused_tokens) == ([[5, 99]], 4)


def test_the_answer_ends_where_the_context_ends():
    context = Context(FakeSession(counting, fake_manifest(context_length=8)))
    tokens, finished, _ = run(context, [1, 2, 3, 4, 5])
    # 3 tokens fit after the prompt, and one more is sampled that is never fed.
    assert (tokens, finished.reason) == ([6, 7, 8, 9], "context")
    assert context.cache.length == 8


def test_max_tokens_beyond_the_context_ends_with_the_context_and_says_so():
    context = Context(FakeSession(counting, fake_manifest(context_length=8)))
    tokens, finished, _ = run(context, [1, 2, 3, 4, 5], max_tokens=100)
    assert (len(tokens), finished.reason) == (4, "context")


def test_a_prompt_of_the_whole_context_has_an_answer_of_one_token():
    context = Context(FakeSession(counting, fake_manifest(context_length=4)))
    tokens, finished, _ = run(context, [1, 2, 3, 4])
    assert (tokens, finished.reason) == ([5], "context")


def test_an_empty_prompt_is_refused():
    with pytest.raises(QrunError, match="the prompt is empty"):
        run(Context(FakeSession(counting)), [])


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers_and_nothing_is_fed():
    session = FakeSession(counting, fake_manifest(context_length=4))
    with pytest.raises(QrunError, match=r"5 tokens, the model's context is 4"):
        run(Context(session), [1, 2, 3, 4, 5])
    assert session.fed == []


def test_times_are_told_for_prompt_and_answer():
    _, finished, _ = run(Context(FakeSession(counting)), [1], max_tokens=5)
    assert finished.prefill_seconds > 0
    assert finished.decode_seconds > 0
