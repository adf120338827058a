"""Guesses from texts, and how often they came true: by whose text it is and how long the match."""

from __future__ import annotations

from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from qrun.decoding.gains import COUNTS, Share
from qrun.decoding.guesses import TextGuesses
from qrun.decoding.sequence import Sequence
from qrun.decoding.suffix_cache import SuffixCache

# Before anything is seen, this share of the guesses is taken to come true, with the weight of so many
# observations. It is too little for a try: a text has to show first that it repeats itself.
_HOPE, _SEEN = 0.25, 3.0
# Guesses are judged by the length of their match, which makes them more likely: up to 2 tokens, up to 4, ...
_LENGTHS = (2, 4, 8, 16)


@dataclass
class _Row:
    """What is known of one answer.

    Attributes:
        text: prompt and answer so far, ``taken`` tokens of the answer.
        shares: how often guesses of each kind came true, in this answer.
        found: the last guesses, of the kind ``kind``, ``tried`` of which were tried.
    """

    text: TextGuesses
    taken: int
    shares: dict[tuple[bool, int], Share] = field(default_factory=dict)
    found: list[int] = field(default_factory=list)
    kind: tuple[bool, int] = (False, 0)
    tried: int = 0


class Repeats:
    """What followed where the end of an answer stood before: in its own text, or in one of the past.

    A new answer begins with what was learnt of all others, and goes on with what it shows itself.

    Args:
        past: texts that have ended; None where none are kept.
    """

    def __init__(self, past: SuffixCache | None = None) -> None:
        self._past = past
        self._rows: WeakKeyDictionary[Sequence, _Row] = WeakKeyDictionary()
        self._shares: dict[tuple[bool, int], Share] = {}

    def guess(self, sequence: Sequence) -> tuple[list[int], float]:
        """All that may come next, and how often such guesses come true. ``take`` is to follow."""
        row = self._rows.get(sequence)
        if row is None:
            row = self._rows[sequence] = _Row(TextGuesses(sequence.prompt_ids), 0)
        new = sequence.token_ids[row.taken :]
        row.text.extend(new)
        row.taken += len(new)
        most = min(COUNTS[-1], sequence.room - 1)
        row.found, length = row.text.guess(most)
        elsewhere = False
        if self._past is not None:
            others, agreeing = self._past.guess(row.text.token_ids, most, length)
            if others:
                row.found, length, elsewhere = others, agreeing, True
        row.tried, row.kind = 0, (elsewhere, sum(length > bound for bound in _LENGTHS))
        return (row.found, self._share(row).value) if row.found else ([], 0.0)

    def take(self, sequence: Sequence, count: int) -> list[int]:
        """The first ``count`` of the guesses, which are about to be tried."""
        row = self._rows[sequence]
        row.tried = count
        return row.found[:count]

    def learn(self, sequence: Sequence, came_true: int) -> None:
        """What became of the step; of another's guesses where these were not tried."""
        row = self._rows.get(sequence)
        if row is None or not row.found:
            return
        for share in (self._share(row), self._shares[row.kind]):
            if row.tried:
                share.see_step(row.tried, came_true)
            else:  # it can be seen all the same whether the guess was right
                share.see(sequence.token_ids[row.taken :][:1] == row.found[:1])

    def _share(self, row: _Row) -> Share:
        """How often guesses of the last kind came true in an answer."""
        if row.kind not in self._shares:
            self._shares[row.kind] = Share(_HOPE, _SEEN)
        if row.kind not in row.shares:
            row.shares[row.kind] = Share(self._shares[row.kind].value, _SEEN)
        return row.shares[row.kind]
