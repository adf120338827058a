"""Rows of a KV cache, and the token ids whose keys and values each of them holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qrun.backends.kvcache import KVCache
from qrun.backends.session import LogitsFor, Session
from qrun.decoding.pieces import GRAIN, Pieces


class Slots:
    """The rows in which several sequences advance together, each with a length of its own.

    A step over n rows computes the first n, so the rows in use are kept together: ``move`` puts the last of
    them into a row that has become free.

    Attributes:
        cache: keys and values of all rows.
        token_ids: the tokens whose keys and values these are, row by row.
        read: for each row, how many of its first tokens were read as a prompt, without logits. Their keys and
            values are those that any prompt with this beginning gives; those of single steps may differ from
            them in the last bits.

    Args:
        session: the model.
        rows: how many sequences there may be.
        even_steps: compute an even number of rows in every step, the last one for nothing where need be. The
            kernels of 4-bit products take two rows at once and an odd last one by itself, in another order of
            sums: without this a row's logits depend on the number of rows, with blocks of more than 32.
    """

    def __init__(self, session: Session, rows: int = 1, *, even_steps: bool = False) -> None:
        self._session = session
        self._count, self._even_steps = rows, even_steps
        held = rows + rows % 2 if even_steps else rows
        self.cache = session.new_cache(held)
        self.token_ids: list[list[int]] = [[] for _ in range(held)]
        self.read = [0] * held
        self._shown: dict[tuple[int, int], KVCache] = {}  # held, so that what is bound for them stays bound

    def __len__(self) -> int:
        return self._count

    def feed(
        self, row: int, token_ids: Sequence[int], *, logits: LogitsFor, whole: bool = True
    ) -> NDArray[np.float32]:
        """Append one or more tokens to one row.

        Args:
            row: which one.
            token_ids: the tokens.
            logits: for which of them.
            whole: whether any prompt that goes on after these tokens reads them in such a piece too.

        Returns:
            float32 ``[vocab]`` of the last token for "last", else ``[positions, vocab]``: the row's own,
            valid until this row is fed again.
        """
        fed = np.asarray(token_ids, dtype=np.int64)[None]
        output = self._session.forward(fed, self._rows(row, 1), logits)
        held = self.token_ids[row]
        if logits == "none" and whole and len(held) == self.read[row]:
            self.read[row] += len(token_ids)
        held.extend(token_ids)
        found: NDArray[np.float32] = output[0, -1] if logits == "last" else output[0]
        return found

    def prepare(self, row: int, prompt: int, answer: int) -> None:
        """Make room in a row for a prompt, and for the first tokens of its answer, before it is read.

        So a cache is as long as it has to be: one that grows from piece to piece is copied over and over.

        Raises:
            QrunError: too little memory.
        """
        begun = min(answer, max(GRAIN, prompt // 16))
        cache = self._rows(row, 1)
        cache.fit(min(prompt + begun, cache.limit))
        cache.reserve(prompt - len(self.token_ids[row]), spare=begun)

    def reads_last_apart(self, new: int) -> bool:
        """Whether the last of ``new`` tokens may be fed by ``step`` too: see ``Session``."""
        return self._session.reads_last_apart(new)

    def step(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Append one token to each of the first rows.

        Returns:
            float32 ``[rows, vocab]``, each row's own as in ``feed``.
        """
        rows = len(token_ids)
        if self._even_steps and rows % 2:
            return self._step_beside(rows, token_ids)
        fed = np.asarray(token_ids, dtype=np.int64)[:, None]
        output = self._session.forward(fed, self._rows(0, rows), "last")
        for held, token_id in zip(self.token_ids, token_ids):
            held.append(token_id)
        return output[:, 0]

    def _step_beside(self, rows: int, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """A step in which the next row computes something that it forgets again."""
        if len(self.token_ids[rows]) >= self.cache.limit:
            self.trim(rows, self.cache.limit - 1)
        beside = len(self.token_ids[rows])
        fed = np.asarray([*token_ids, token_ids[0]], dtype=np.int64)[:, None]
        output = self._session.forward(fed, self._rows(0, rows + 1), "last")
        self._rows(rows, 1).trim(beside)
        for held, token_id in zip(self.token_ids, token_ids):
            held.append(token_id)
        return output[:rows, 0]

    def keep(self, row: int, prompt_ids: Sequence[int], pieces: Pieces | None = None) -> int:
        """Keep what ``prompt_ids`` begins with and forget the rest of a row; returns the tokens kept.

        At least one token is left to be fed, since only a fed token has logits.

        Args:
            row: which one.
            prompt_ids: the whole prompt.
            pieces: keep whole pieces only, and only what was ``read`` as a prompt: the keys and values that
                reading this prompt anew would give. By default all is kept.
        """
        kept = 0
        for cached, wanted in zip(self.token_ids[row], prompt_ids[:-1]):
            if cached != wanted:
                break
            kept += 1
        if pieces is not None:
            kept = pieces.whole(min(kept, self.read[row]), len(prompt_ids))
        self.trim(row, kept)
        return kept

    def trim(self, row: int, length: int) -> None:
        """Forget everything after the first ``length`` tokens of a row."""
        self._rows(row, 1).trim(length)
        del self.token_ids[row][length:]
        self.read[row] = min(self.read[row], length)

    def move(self, source: int, target: int) -> None:
        """Put what one row holds into another one, and forget it in the first."""
        length = len(self.token_ids[source])
        self.trim(target, 0)
        self.cache.copy_in(target, 0, self.cache.copy_out(source, 0, length))
        self.token_ids[target] = self.token_ids[source]
        self.read[target] = self.read[source]
        self.token_ids[source] = []
        self._rows(source, 1).trim(0)
        self.read[source] = 0

    def copy_out(self, row: int, start: int, stop: int) -> list[NDArray[Any]]:
        """Keys and values of some tokens of a row; see ``KVCache.copy_out``."""
        return self.cache.copy_out(row, start, stop)

    def copy_in(self, row: int, token_ids: Sequence[int], states: list[NDArray[Any]]) -> None:
        """Append tokens to a row that were read as a prompt elsewhere, with the states of ``copy_out``.

        Raises:
            QrunError: more memory than the machine has left.
        """
        held = self.token_ids[row]
        assert self.read[row] == len(held), "the row holds tokens that were not read as a prompt"
        self.cache.copy_in(row, len(held), states)
        held.extend(token_ids)
        self.read[row] = len(held)

    def _rows(self, first: int, count: int) -> KVCache:
        found = self._shown.get((first, count))
        if found is None:
            found = self._shown[first, count] = self.cache.rows(first, count)
        return found
