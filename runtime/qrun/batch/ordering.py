"""In which order prompts are answered: common beginnings beside each other, and the short ones last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import TypeVar

Work = TypeVar("Work")
# Tokens of the pieces in which the engine keeps beginnings of prompts; a test compares.
BEGINNING = 128
# A token that is generated takes about as long as so many that are read, with several rows.
_COST = 4


def ordered(
    work: Sequence[Work], ids: Callable[[Work], list[int]], new: Callable[[Work], int], *, tail: int
) -> list[Work]:
    """The order in which to answer.

    1. Prompts that share their first tokens follow each other, so that these are read once and found by the
       others while they are kept.
    2. Of the rest a long and a short one take turns, so that rows read while others decode.
    3. The ``tail`` cheapest of the rest come last, the dearest of these first, so that at the end no row runs
       on alone for long.

    Args:
        work: what is to be ordered.
        ids: gives a prompt's token ids.
        new: gives the most tokens of its answer.
        tail: how many to keep for the end; 0 where more follows.
    """
    alike = sorted(work, key=ids)
    shared: list[Work] = []
    rest: list[Work] = []
    for before, each, after in zip([None, *alike], alike, [*alike[1:], None]):
        begins = ids(each)[:BEGINNING]
        near = [ids(other)[:BEGINNING] for other in (before, after) if other is not None]
        (shared if len(begins) == BEGINNING and begins in near else rest).append(each)
    rest.sort(key=lambda each: len(ids(each)) + _COST * new(each), reverse=True)
    cut = max(0, len(rest) - tail)
    middle, last = rest[:cut], rest[cut:]
    half = (len(middle) + 1) // 2
    turns = zip_longest(middle[:half], reversed(middle[half:]))
    return [*shared, *(each for pair in turns for each in pair if each is not None), *last]
