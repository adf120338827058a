"""Texts of the past, and where the last tokens of a new one stand in them.

As in suffix decoding, a text that goes on as an earlier one did is guessed from it. In place of a suffix tree
there are three tables, from a hash of the last 16, 8 or 4 tokens to the latest place behind them: two small
arrays' worth of memory a token, and a look-up that does not depend on how much is kept.

Source: Oliaro et al. 2024, "SuffixDecoding" (arXiv:2411.04975).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul

import numpy as np
from numpy.typing import NDArray

# Tokens of a match that are found by their hash, the longest first: it is the likeliest to go on alike.
_KEYS = (16, 8, 4)
# Tokens of a match that are compared at most.
_MOST = 32
# Places of each table for a token that may be kept: with more, fewer places are lost to others' hashes.
_PLACES = 2
# Of a text that is to be kept, so many places are tried to find where it stands already.
_TRIES = 8
# Stands before and behind each text, so that no match and no guess goes beyond it.
_EDGE = -1
# Factors of the tokens of a key, the last token's first, and one that spreads their sum over all bits.
_FACTORS = [0x1E3779B9 ^ 0x2545F491 * place % 0x1FFFFFFF for place in range(1, _KEYS[0] + 1)]
_SPREAD, _WORD = 0x9E3779B97F4A7C15, (1 << 64) - 1


class SuffixCache:
    """The tokens of texts that have ended, the newest kept.

    Args:
        most_tokens: how many are kept, of all texts together.
    """

    def __init__(self, most_tokens: int) -> None:
        self._tokens: NDArray[np.int32] = np.full(most_tokens + 2, _EDGE, dtype=np.int32)
        self._end = 1  # where the next text goes; the one before this place is an edge
        bits = max(8, (_PLACES * most_tokens - 1).bit_length())
        self._shift = 64 - bits
        self._tables = [np.zeros(1 << bits, dtype=np.int32) for _ in _KEYS]

    @property
    def nbytes(self) -> int:
        """Bytes that it takes once it is full."""
        return self._tokens.nbytes + sum(table.nbytes for table in self._tables)

    def add(self, token_ids: Sequence[int]) -> None:
        """Keep a text; the oldest ones are dropped for it, and its beginning is if it is too long.

        What it begins with and is kept already is not kept twice, unless it would soon be dropped.
        """
        text = np.array(token_ids[2 - len(self._tokens) :], dtype=np.int32)
        known = self._known(text)
        if known == len(text):
            return
        text = text[max(0, known - _KEYS[0]) :]  # so many before it, that its first new token is found
        start = self._end
        if start + len(text) >= len(self._tokens):  # each text lies in one piece
            self._tokens[start:] = _EDGE
            start = 1
        self._tokens[start : start + len(text)] = text
        self._end = start + len(text) + 1
        self._tokens[self._end - 1] = _EDGE
        for count, table in zip(_KEYS, self._tables):
            if len(text) > count:  # where one token is repeated in an index the last one's value is taken
                table[self._places(text, count)] = np.arange(start + count, start + len(text))

    def guess(self, token_ids: Sequence[int], most: int, longer_than: int = 0) -> tuple[list[int], int]:
        """What may come next.

        Args:
            token_ids: a text so far.
            most: how many tokens at most.
            longer_than: only where more tokens than these agree.

        Returns:
            The tokens that followed where its end stood before, none where it did not; and how many agree.
        """
        tail = token_ids[: -_KEYS[0] - 1 : -1]
        keys = list(accumulate(map(mul, tail, _FACTORS)))
        for count, table in zip(_KEYS, self._tables):
            if len(tail) < count:
                continue
            place = int(table[(keys[count - 1] * _SPREAD & _WORD) >> self._shift])
            agreeing = self._agreeing(place, token_ids)
            if agreeing >= count:  # else another key with this hash came later, or the text is gone
                found = self._tokens[place : place + most].tolist() if agreeing > longer_than else []
                return (found[: found.index(_EDGE)] if _EDGE in found else found), agreeing
        return [], 0

    def _agreeing(self, place: int, token_ids: Sequence[int]) -> int:
        """How many tokens before a place are those at the end of a text."""
        if not place or self._tokens[place - 1] != token_ids[-1]:
            return 0
        agreeing = 0
        before = self._tokens[max(0, place - _MOST) : place][::-1].tolist()
        for kept, token_id in zip(before, token_ids[: -_MOST - 1 : -1]):
            if kept != token_id:
                break
            agreeing += 1
        return agreeing

    def _places(self, text: NDArray[np.int32], count: int) -> NDArray[np.int64]:
        """Where a table has the places behind each ``count`` tokens of a text."""
        words = text.astype(np.uint64)
        last = len(text) - 1
        keys = np.zeros(last + 1 - count, dtype=np.uint64)
        for back in range(count):
            keys += words[count - 1 - back : last - back] * np.uint64(_FACTORS[back])
        places: NDArray[np.uint64] = keys * np.uint64(_SPREAD) >> np.uint64(self._shift)
        return places.astype(np.int64)

    def _known(self, text: NDArray[np.int32]) -> int:
        """With how many tokens that are kept already, and not among the oldest half, a text begins."""
        known = 0
        while True:
            first = max(known, _KEYS[0])
            for at in range(first, min(first + _TRIES, len(text))):
                place = self._place_of(text[at - _KEYS[0] : at + 1])
                if place:
                    break
            else:
                return known
            kept = self._tokens[place : place + len(text) - at]
            same = text[at : at + len(kept)] == kept
            known = at + (len(same) if same.all() else int(same.argmin()))

    def _place_of(self, window: NDArray[np.int32]) -> int:
        """Where a key and the token behind it are kept; 0 if they are not, or will soon be dropped."""
        place = int(self._tables[0][self._places(window, _KEYS[0])[0]])
        young = (self._end - place) % len(self._tokens) < len(self._tokens) // 2
        kept = self._tokens[max(0, place - _KEYS[0]) : place + 1]
        return place if young and np.array_equal(kept, window) else 0
