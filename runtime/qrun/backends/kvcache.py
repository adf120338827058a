"""The KV cache: how much of it is filled, how it grows, what it will cost.

Keys and values of layer i are two buffers ``[rows, kv_heads, capacity, head_size]``. This file
knows lengths and policy; a backend supplies the memory by overriding ``_reallocate``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from qrun.backends.ledger import LEDGER
from qrun.errors import QrunError
from qrun.folder.manifest import Manifest, forecast_bytes

if TYPE_CHECKING:
    from typing_extensions import Self

# Below 256 tokens a copy is not worth saving. After that a cache grows by an eighth: a step over 8,000
# tokens reads them all, and once in 1,000 steps they are copied as well. Twice as long a cache would need
# twice the memory, and attention by groups multiplies it to its end (``ort/attention.py``).
MINIMUM_CAPACITY = 256
_LEAST_GROWTH = 64


def next_capacity(needed: int, current: int, limit: int, spare: int | None = None) -> int:
    """The capacity to grow to: with some room to spare, never above ``limit`` (all in tokens)."""
    if spare is None:
        spare = max(_LEAST_GROWTH, current // 8) if current else 0
    return min(limit, max(needed + spare, MINIMUM_CAPACITY))


class KVCache(ABC):
    """Keys and values of ``batch`` sequences, each filled up to its own length.

    ``rows`` gives some of the rows as a cache of their own over the same memory: what is fed to them, and
    what is cut off, changes these rows and no others.

    Attributes:
        lengths: int64 ``[batch]``, tokens in the cache of each row.
        limit: the model's context length, which no row may exceed.

    Args:
        manifest: of the model.
        batch: number of rows.
        pool: the owner of the memory, where this cache only shows some of its rows.
        first: the first of these rows.
    """

    # Whether its memory is the machine's and not a GPU's.
    in_host_memory = True
    # Whether the capacity decides by which kernels it is read.
    chooses_by_capacity = False

    def __init__(
        self, manifest: Manifest, batch: int = 1, *, pool: Self | None = None, first: int = 0
    ) -> None:
        self.manifest = manifest
        self.batch = batch
        self.limit = manifest.model.context_length
        # Rows hold their pool, and the pool only weakly its rows: without a cycle buffers are freed as soon
        # as nobody holds them, and not only when the garbage collector runs.
        self._pool = pool
        self._shown: WeakValueDictionary[tuple[int, int], Self] = WeakValueDictionary()
        if pool is None:
            self.lengths: NDArray[np.int64] = np.zeros(batch, dtype=np.int64)
            # The most tokens that the present buffers have held: their pages are taken.
            self._touched: NDArray[np.int64] = np.zeros(batch, dtype=np.int64)
            self._capacity = 0
            LEDGER.enter(self)
        else:
            self.lengths = pool.lengths[first : first + batch]
            self._touched = pool._touched[first : first + batch]

    @property
    def pool(self) -> Self:
        """The cache that owns the memory: this one, or the one that it shows some rows of."""
        return self if self._pool is None else self._pool

    @property
    def capacity(self) -> int:
        """Tokens that fit into a row before the buffers have to grow."""
        return self.pool._capacity

    @property
    def length(self) -> int:
        """Tokens in the longest row."""
        return int(self.lengths[0]) if self.batch == 1 else int(self.lengths.max())

    @property
    def nbytes(self) -> int:
        """Bytes that the buffers of these rows take now."""
        return forecast_bytes(self.manifest, self.capacity, self.batch)

    @property
    def untouched_bytes(self) -> int:
        """The part of ``nbytes`` that no token was written to: the system has not given it out yet."""
        if not self.in_host_memory:
            return 0
        touched = int(np.maximum(self._touched, self.lengths).sum())
        return self.nbytes - forecast_bytes(self.manifest, touched)

    @property
    def held_bytes(self) -> int:
        """``nbytes``, where it is the machine's memory."""
        return self.nbytes if self.in_host_memory else 0

    def rows(self, first: int, count: int) -> Self:
        """Rows ``first`` to ``first + count`` as a cache of their own over the same memory.

        As long as somebody holds such a cache, it is returned again, so what is bound for it stays bound.

        Raises:
            QrunError: this kind of cache has no rows apart.
        """
        assert 0 <= first < first + count <= self.batch, f"rows {first} to {first + count} of {self.batch}"
        if count == self.batch:
            return self
        found = self._shown.get((first, count))
        if found is None:
            found = self._shown[first, count] = self._show(first, count)
        return found

    def reserve(self, new_tokens: int, *, spare: int | None = None) -> None:
        """Make room for ``new_tokens`` more in every row; what is cached stays.

        Args:
            new_tokens: how many.
            spare: room for so many beyond these, if there is memory for it; by default buffers that have to
                grow get room for an eighth more.

        Raises:
            QrunError: past the context length, or more memory than the machine has left.
        """
        needed = self.length + new_tokens
        if min(needed + (spare or 0), self.limit) <= self.capacity and needed <= self.capacity:
            return
        self.check_limit(needed)
        with LEDGER.lock:
            self.pool._grow(needed, spare=spare)

    def fit(self, tokens: int) -> None:
        """Before there are ``tokens`` in a row: give back what lies beyond, where it decides on kernels.

        So the last bits of an answer do not depend on what the cache has held before.
        """
        wanted = max(tokens, MINIMUM_CAPACITY)
        if not self.chooses_by_capacity or self.capacity <= wanted:
            return
        with LEDGER.lock, suppress(MemoryError):  # without room for both, the longer one stays
            self._reallocate(wanted)
            self._capacity = wanted
            self._touched[:] = self.lengths

    def check_limit(self, needed: int) -> None:
        """Refuse ``needed`` tokens in a row.

        Raises:
            QrunError: past the context length.
        """
        if needed > self.limit:
            raise QrunError(
                f"{needed:,} tokens do not fit: {self.manifest.name} has a context of {self.limit:,}",
                hint="shorten the prompt, or start over with /reset in a chat",
            )

    def advance(self, new_tokens: int) -> None:
        """Count ``new_tokens`` that a forward pass has just written into each of these rows."""
        self.lengths += new_tokens

    def trim(self, length: int) -> None:
        """Forget everything after the first ``length`` tokens of each of these rows."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot trim a cache of {self.length} tokens to {length}")
        np.maximum(self._touched, self.lengths, out=self._touched)
        np.minimum(self.lengths, length, out=self.lengths)

    def put_back(self, lengths: NDArray[np.int64]) -> None:
        """Forget what a failed forward pass has written: each row gets the length that it had before."""
        np.maximum(self._touched, self.lengths, out=self._touched)
        self.lengths[:] = lengths

    def copy_out(self, row: int, start: int, stop: int) -> list[NDArray[Any]]:
        """Keys and values ``start`` to ``stop`` of a row: ``[kv_heads, tokens, head_size]`` of each buffer.

        Raises:
            QrunError: this kind of cache has no rows apart.
        """
        raise self._not_apart()

    def copy_in(self, row: int, start: int, states: list[NDArray[Any]]) -> None:
        """Put what ``copy_out`` gave after the first ``start`` tokens of a row, whatever it held there.

        Raises:
            QrunError: this kind of cache has no rows apart, or more memory than the machine has left.
        """
        raise self._not_apart()

    def _grow(self, needed: int, *, spare: int | None) -> None:
        capacity = next_capacity(needed, self.capacity, self.limit, spare)
        free = LEDGER.free_bytes(self) if self.in_host_memory else None
        if free is not None and forecast_bytes(self.manifest, capacity, self.batch) > free:
            capacity = needed  # what is needed may fit where room to spare does not
            if capacity <= self.capacity:
                return
        cost = forecast_bytes(self.manifest, capacity, self.batch)
        while free is not None and cost > free and LEDGER.give_way():
            free = LEDGER.free_bytes(self)
        refusal = QrunError(
            f"a KV cache of {capacity:,} tokens needs {cost / 1e9:.2f} GB"
            + ("" if free is None else f", {free / 1e9:.2f} GB of memory are free"),
            hint="use a shorter context, or free some memory",
        )
        if free is not None and cost > free:
            raise refusal
        try:
            self._reallocate(capacity)
        except MemoryError as error:
            raise refusal from error
        self._capacity = capacity
        self._touched[:] = self.lengths

    @abstractmethod
    def _reallocate(self, capacity: int) -> None:
        """Move to buffers of ``capacity`` tokens, keeping what each row holds.

        If there is no memory for one of the new buffers, the old ones stay in place.
        """

    def _show(self, first: int, count: int) -> Self:
        """A cache of some rows over the memory of this one."""
        raise self._not_apart()

    def _not_apart(self) -> QrunError:
        return QrunError(
            "this kind of KV cache has no rows that could be used apart",
            where=self.manifest.folder,
            hint="run one sequence at a time; or use a folder for onnxruntime and a cache in place",
        )
