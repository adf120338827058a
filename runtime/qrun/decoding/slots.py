"""Rows of a KV cache, and the token ids whose keys and values each of them holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qrun.backends.kvcache import KVCache
from qrun.backends.session import LogitsFor, Session


@dataclass(frozen=True)
class Prefix:
    """Keys and values of some tokens, outside any cache: what ``Slots.copy_out`` gives.

    Attributes:
        token_ids: whose they are.
        states: ``[kv_heads, tokens, head_size]`` of each buffer of the cache.
        piece_ends: see ``Slots``.
    """

    token_ids: tuple[int, ...]
    states: list[NDArray[Any]]
    piece_ends: tuple[int, ...] = ()


class Slots:
    """The rows in which several sequences advance together, each with a length of its own.

    A step over some rows computes the first rows only, so those in use are kept together: ``move`` puts the
    last of them where a row has become free.

    Attributes:
        cache: keys and values of all rows.
        token_ids: whose they are, row by row.
        piece_ends: for each row, where the pieces end that were read without logits, one behind the other
            from the row's beginning. Keys and values depend in their last bits on how many tokens were read
            together, and for these that is known.
    """

    def __init__(self, session: Session, rows: int = 1) -> None:
        self._session = session
        self.cache = session.new_cache(rows)
        self.token_ids: list[list[int]] = [[] for _ in range(rows)]
        self.piece_ends: list[list[int]] = [[] for _ in range(rows)]
        self._shown: dict[tuple[int, int], KVCache] = {}  # held, so that what is bound for them stays bound

    def __len__(self) -> int:
        return len(self.token_ids)

    def feed(self, row: int, token_ids: Sequence[int], *, logits: LogitsFor) -> NDArray[np.float32]:
        """Append one or more tokens to one row.

        Returns:
            float32 ``[vocab]`` of the last token for "last", else ``[positions, vocab]``: the row's own, good
            until this row is fed again.
        """
        fed = np.asarray(token_ids, dtype=np.int64)[None]
        output = self._session.forward(fed, self._rows(row, 1), logits)
        held, ends = self.token_ids[row], self.piece_ends[row]
        if logits == "none" and len(held) == (ends[-1] if ends else 0):
            ends.append(len(held) + len(token_ids))
        held.extend(token_ids)
        found: NDArray[np.float32] = output[0, -1] if logits == "last" else output[0]
        return found

    def step(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Append one token to each of the first rows.

        Returns:
            float32 ``[rows, vocab]``, each row's own as in ``feed``.
        """
        rows = len(token_ids)
        fed = np.asarray(token_ids, dtype=np.int64)[:, None]
        output = self._session.forward(fed, self._rows(0, rows), "last")
        for held, token_id in zip(self.token_ids, token_ids):
            held.append(token_id)
        return output[:, 0]

    def keep(self, row: int, prompt_ids: Sequence[int], *, piece: int | None = None) -> int:
        """Keep what ``prompt_ids`` begins with and forget the rest of a row; returns the tokens kept.

        At least one token is left to be fed, since only a fed token has logits.

        Args:
            row: which one.
            prompt_ids: the whole prompt.
            piece: keep only what was read in pieces of exactly so many tokens, which are the keys and values
                that reading this prompt anew would give, to the last bit. By default all is kept.
        """
        kept = 0
        for cached, wanted in zip(self.token_ids[row], prompt_ids[:-1]):
            if cached != wanted:
                break
            kept += 1
        if piece is not None:
            pieces = 0
            for end in self.piece_ends[row]:
                if end != (pieces + 1) * piece or end > kept:
                    break
                pieces += 1
            kept = pieces * piece
        self.trim(row, kept)
        return kept

    def trim(self, row: int, length: int) -> None:
        """Forget everything after the first ``length`` tokens of a row."""
        self._rows(row, 1).trim(length)
        del self.token_ids[row][length:]
        self.piece_ends[row] = [end for end in self.piece_ends[row] if end <= length]

    def move(self, source: int, target: int) -> None:
        """Put what one row holds into another one, and forget it in the first."""
        self.copy_in(target, self.copy_out(source, len(self.token_ids[source])))
        self.trim(source, 0)

    def copy_out(self, row: int, length: int) -> Prefix:
        """The first ``length`` tokens of a row, with their keys and values."""
        ends = tuple(end for end in self.piece_ends[row] if end <= length)
        return Prefix(tuple(self.token_ids[row][:length]), self.cache.copy_out(row, length), ends)

    def copy_in(self, row: int, prefix: Prefix) -> None:
        """Fill a row with a prefix; what it held is forgotten.

        Raises:
            QrunError: more memory than the machine has left.
        """
        self.trim(row, 0)
        self.cache.copy_in(row, prefix.states)
        self.token_ids[row] += prefix.token_ids
        self.piece_ends[row] += prefix.piece_ends

    def _rows(self, first: int, count: int) -> KVCache:
        found = self._shown.get((first, count))
        if found is None:
            found = self._shown[first, count] = self.cache.rows(first, count)
        return found
