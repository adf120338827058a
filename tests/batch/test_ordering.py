"""If these fail, common beginnings are read again and again, or the end of a batch runs on one row."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qrun.batch.ordering import BEGINNING, ordered
from qrun.decoding.pieces import PIECE

PROMPTS = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 150), st.integers(1, 99)), max_size=40)


def order(work, tail):
    return ordered(work, lambda each: each[0], lambda each: each[1], tail=tail)


@given(PROMPTS, st.integers(0, 9))
def test_nothing_is_lost_or_doubled(sizes, tail):
    work = [([kind] * length, new, index) for index, (kind, length, new) in enumerate(sizes)]
    assert sorted(order(work, tail), key=lambda each: each[2]) == work


def test_common_beginnings_follow_each_other():
    assert BEGINNING == PIECE
    beginnings = [[kind] * PIECE for kind in range(3)]
    work = [(beginnings[n % 3] + [n], 8) for n in range(30)]
    kinds = [ids[0] for ids, _ in order(work, 4)]
    assert kinds == sorted(kinds)


def test_the_end_is_short_and_the_middle_is_mixed():
    work = [([n], n) for n in range(1, 41)]
    found = [new for _, new in order(work, 8)]
    assert found[-8:] == [8, 7, 6, 5, 4, 3, 2, 1]
    assert found[:4] == [40, 9, 39, 10]
