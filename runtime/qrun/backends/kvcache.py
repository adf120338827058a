"""The KV cache: how much of it is filled, how it grows, what it will cost.

Keys and values of layer i are two buffers ``[batch, kv_heads, capacity, head_size]``. This file
knows lengths and policy; a backend supplies the memory by overriding ``_reallocate``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from qrun.errors import QrunError
from qrun.folder.manifest import Manifest, forecast_bytes
from qrun.machine import available_memory

# Growing by doubling costs at most one copy of every entry; below 256 tokens a copy is not worth saving.
MINIMUM_CAPACITY = 256


def next_capacity(needed: int, current: int, limit: int) -> int:
    """The capacity to grow to: doubled, at least ``needed``, never above ``limit`` (all in tokens)."""
    return min(limit, max(needed, 2 * current, MINIMUM_CAPACITY))


class KVCache(ABC):
    """Keys and values of ``batch`` sequences, each filled up to its own length.

    Attributes:
        lengths: int64 ``[batch]``, tokens in the cache of each row.
        capacity: tokens that fit before the buffers have to grow.
        limit: the model's context length, which no row may exceed.
    """

    def __init__(self, manifest: Manifest, batch: int = 1) -> None:
        self.manifest = manifest
        self.batch = batch
        self.limit = manifest.model.context_length
        self.lengths: NDArray[np.int64] = np.zeros(batch, dtype=np.int64)
        self.capacity = 0

    @property
    def length(self) -> int:
        """Tokens in the longest row."""
        return int(self.lengths[0]) if self.batch == 1 else int(self.lengths.max())

    @property
    def nbytes(self) -> int:
        """Bytes that the buffers take now."""
        return forecast_bytes(self.manifest, self.capacity, self.batch)

    def reserve(self, new_tokens: int) -> None:
        """Make room for ``new_tokens`` more in every row; what is cached stays.

        Raises:
            QrunError: past the context length, or more memory than the machine has left.
        """
        needed = self.length + new_tokens
        if needed <= self.capacity:
            return
        self.check_limit(needed)
        capacity = next_capacity(needed, self.capacity, self.limit)
        available = available_memory()
        if available is not None and forecast_bytes(self.manifest, capacity, self.batch) > available:
            capacity = needed  # what is needed may fit where twice as much does not
        cost = forecast_bytes(self.manifest, capacity, self.batch)
        if available is not None and cost > available:
            raise QrunError(
                f"a KV cache of {capacity:,} tokens needs {cost / 1e9:.2f} GB, "
                f"{available / 1e9:.2f} GB of memory are free",
                hint="use a shorter context, or free some memory",
            )
        self._reallocate(capacity)
        self.capacity = capacity

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
        """Count ``new_tokens`` that a forward pass has just written into every row."""
        self.lengths += new_tokens

    def trim(self, length: int) -> None:
        """Forget everything after the first ``length`` tokens of every row."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot trim a cache of {self.length} tokens to {length}")
        np.minimum(self.lengths, length, out=self.lengths)

    @abstractmethod
    def _reallocate(self, capacity: int) -> None:
        """Move to buffers of ``capacity`` tokens, keeping the first ``self.length`` of each row."""
