"""If these fail, guesses from texts of the past are wrong, missed, or take more memory than they may."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qrun.decoding.sequence import Sequence
from qrun.decoding.speculation import Speculation, new_speculation
from qrun.decoding.suffix_cache import SuffixCache
from qrun.errors import QrunError
from qrun.sampling.params import SamplingParams
from tests.fakes import FakeSession


def some(seed: int, count: int) -> list[int]:
    found: list[int] = np.random.default_rng(seed).integers(0, 40_000, count).tolist()
    return found


def known(cache: SuffixCache, text: list[int], at: int, most: int = 5) -> bool:
    return cache.guess([99_999, *text[:at]], most)[0] == text[at : at + most]


def test_a_text_that_goes_on_like_an_earlier_one_is_guessed_from_it() -> None:
    cache = SuffixCache(2_000)
    text = some(1, 300)
    cache.add(text)
    assert all(known(cache, text, at) for at in range(4, 295))
    found = [cache.guess([7, *text[at : at + 4]], 3) == (text[at + 4 : at + 7], 4) for at in range(290)]
    assert found.count(True) > 260  # two keys of one hash: the earlier place is lost
    at = found.index(True)
    assert cache.guess(text[:100], 3) == (text[100:103], 32)
    assert cache.guess([7, *text[at : at + 4]], 3, longer_than=4)[0] == []
    assert cache.guess([7, *text[11:14]], 3) == ([], 0)
    assert cache.guess([], 3) == ([], 0)


def test_no_guess_goes_beyond_the_end_of_a_text_into_another_one() -> None:
    cache = SuffixCache(2_000)
    first, second = some(1, 40), some(2, 40)
    cache.add(first)
    cache.add(second)
    assert cache.guess(first[:38], 15)[0] == first[38:]
    assert cache.guess(first, 15)[0] == []
    assert cache.guess([*first[-3:], second[0]], 15)[0] == []


def test_the_latest_of_two_places_counts_and_the_longest_match_before_it() -> None:
    cache = SuffixCache(2_000)
    begin = some(1, 20)
    cache.add([*begin, 1, 2, 3])
    cache.add([*begin[-6:], 4, 5, 6])
    assert cache.guess(begin[-6:], 3)[0] == [4, 5, 6]
    assert cache.guess(begin, 3)[0] == [1, 2, 3]


def test_the_oldest_are_dropped_and_a_text_that_is_too_long_loses_its_beginning() -> None:
    cache = SuffixCache(500)
    texts = [some(seed, 100) for seed in range(30)]
    before = cache.nbytes
    for text in texts:
        cache.add(text)
    assert cache.nbytes == before
    assert all(known(cache, text, 50) for text in texts[-4:])
    assert not any(known(cache, text, 50) for text in texts[:-5])
    long = some(99, 2_000)
    cache.add(long)
    assert known(cache, long, 1_990)
    assert not known(cache, long, 1_000)


def test_what_is_kept_already_is_not_kept_twice() -> None:
    """The turns of a conversation, each of which begins with all before."""
    cache, turns = SuffixCache(20_000), list[int]()
    for turn in range(20):
        turns += some(turn, 200)
        cache.add(turns)
    assert cache._end < 20 * 230
    assert sum(known(cache, turns, at) for at in range(4, 3_990)) > 3_900


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2), max_size=50), max_size=12), st.integers(1, 120), st.integers(1, 15)
)
def test_a_guess_stood_in_one_of_the_texts_behind_the_same_tokens(texts, most_tokens, most) -> None:
    cache, added = SuffixCache(most_tokens), list[list[int]]()
    for text in texts:
        found, length = cache.guess(text, most)
        assert len(found) <= most
        if found:
            wanted = text[len(text) - length :] + found
            assert length >= 4
            assert any(each[at : at + len(wanted)] == wanted for each in added for at in range(len(each)))
        cache.add(text)
        added.append(text)


def test_a_longer_match_in_the_past_is_taken_and_an_equal_one_is_not() -> None:
    def asked(past: list[int], prompt: list[int]) -> list[int]:
        speculation = Speculation(past_tokens=1_000)
        ended = Sequence(past, SamplingParams(), 1_000)
        ended.token_ids.append(1)
        speculation.ended(ended)
        sequence = Sequence(prompt[:-1], SamplingParams(max_tokens=50), 1_000)
        sequence.token_ids.append(prompt[-1])
        assert speculation._repeats is not None
        return speculation._repeats.guess(sequence)[0][:2]

    assert asked([11, 12, 13, 14, 15, 8, 8], [13, 14, 15, 3, 4, 11, 12, 13, 14, 15]) == [8, 8]
    assert asked([12, 13, 14, 15, 8, 8], [12, 13, 14, 15, 3, 4, 12, 13, 14, 15]) == [3, 4]


def test_it_can_be_turned_off_and_nothing_is_kept_of_what_has_no_answer() -> None:
    session = FakeSession(lambda seen: 1)
    off = new_speculation(session, None, 0, speculate=True)
    assert off is not None
    assert off._past is None
    assert new_speculation(session, None, 100, speculate=False) is None
    with pytest.raises(QrunError, match="-1 tokens"):
        new_speculation(session, None, -1, speculate=True)
    on = new_speculation(session, None, 100, speculate=True)
    assert on is not None
    assert on._past is not None
    on.ended(Sequence(some(1, 30), SamplingParams(), 1_000))
    assert on._past.guess(some(1, 30)[:20], 5) == ([], 0)
