"""The KV caches of an ONNX Runtime session: buffers that a graph writes in place, or tensors that grow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qrun.backends.kvcache import KVCache
from qrun.backends.ort.attention import BY_GROUPS, pays_by_groups
from qrun.backends.ort.values import Buffer, Values

if TYPE_CHECKING:
    from typing_extensions import Self


class OrtKVCache(KVCache):
    """What all kinds of cache share: the binding, and the buffers for tokens, mask and logits.

    Args:
        values: the memory of the session whose cache it is.
        inference: ONNX Runtime's session of the graph that decodes.
        batch: number of rows.
    """

    # Whether a graph may be given several tokens for each of several rows that are not empty.
    takes_several = False

    def __init__(
        self, values: Values, inference: Any, batch: int, *, pool: Self | None = None, first: int = 0
    ) -> None:
        super().__init__(values.manifest, batch, pool=pool, first=first)
        self.values = values
        self.inference = inference
        self.in_host_memory = values.on_cpu
        self._binding = inference.io_binding()
        # ONNX Runtime reads and writes these arrays and does not keep them alive, so they are kept here.
        self._mask: NDArray[np.int64] = np.ones((batch, 0), dtype=np.int64)
        self._ones = np.ones((batch, 1), dtype=np.int64)
        self._tokens: NDArray[np.int64] = np.empty((batch, 0), dtype=np.int64)
        self._logits: NDArray[np.float32] = np.empty((batch, 0, 0), dtype=np.float32)
        self._bound: tuple[int, str] | None = None
        if pool is None:
            vocab_size = values.manifest.model.vocab_size
            self._last: NDArray[np.float32] = np.empty((batch, 1, vocab_size), dtype=np.float32)
        else:
            # Each row has its own place for logits, which stay until this row is fed again.
            self._last = pool._last[first : first + batch]

    def bind(self, new: int, logits: str) -> Any:
        """Bind inputs and outputs for ``new`` tokens; what has not changed since the last call stays."""
        if self._bound != (new, logits):
            self._bind_sizes(new, logits)
            self._bound = (new, logits)
        self._mask = self.attention_mask(new)
        self._binding.bind_ortvalue_input("attention_mask", self.values.value(self._mask))
        return self._binding

    def token_ids(self, new: int) -> NDArray[np.int64]:
        """The bound input buffer ``[batch, new]``, to be filled before running."""
        return self._tokens

    def logits(self, new: int, logits: str) -> NDArray[np.float32]:
        """The bound output buffer ``[batch, positions, vocab]``."""
        return self._logits

    def collect(self) -> None:
        """Take over what a run returned, where it was not written in place."""

    def _bind_sizes(self, new: int, logits: str) -> None:
        self._tokens = np.empty((self.batch, new), dtype=np.int64)
        if logits == "last":
            self._logits = self._last
        else:
            positions = new if logits == "all" else 0
            shape = (self.batch, positions, self.manifest.model.vocab_size)
            self._logits = np.empty(shape, dtype=np.float32)
        self._binding.bind_ortvalue_input("input_ids", self.values.value(self._tokens))
        self._binding.bind_ortvalue_input("logits_start", self.values.positions(logits))
        self._binding.bind_ortvalue_output("logits", self.values.value(self._logits))

    def attention_mask(self, new: int) -> NDArray[np.int64]:
        """Ones for what each row has seen, new tokens included: int64 ``[batch, longest]``."""
        total = self.length + new
        if self.batch == 1:
            if self._ones.shape[1] < total:
                self._ones = np.ones((1, max(total, self.capacity)), dtype=np.int64)
            return self._ones[:, :total]
        return (np.arange(total) < (self.lengths + new)[:, None]).astype(np.int64)


class InPlaceKVCache(OrtKVCache):
    """Past and present are one buffer at full capacity: nothing is copied at a step."""

    def __init__(
        self, values: Values, inference: Any, batch: int, *, pool: Self | None = None, first: int = 0
    ) -> None:
        super().__init__(values, inference, batch, pool=pool, first=first)
        self._first = first
        self._buffers: list[Buffer] = []
        self._bound_buffers: list[Buffer] | None = None
        # A row among others gets the same bits in any company, so its attention must not depend on theirs.
        alone = values.on_cpu and self.pool.batch == 1
        defaults = inference.get_overridable_initializers() if alone else []
        self.chooses_by_capacity = any(entry.name == BY_GROUPS for entry in defaults)

    @property
    def buffers(self) -> list[Buffer]:
        """In the order of ``Values.kv_names``, for all rows of the pool; another list after each growth."""
        return self.pool._buffers

    def bind(self, new: int, logits: str) -> Any:
        if self._bound_buffers is not self.buffers:
            self.bind_buffers(self._binding)
            self._bound_buffers = self.buffers
        if self.chooses_by_capacity:
            pays = new == 1 and pays_by_groups(self.length + 1, self.capacity)
            self._binding.bind_ortvalue_input(BY_GROUPS, self.values.flag(on=pays))
        return super().bind(new, logits)

    def bind_buffers(self, binding: Any, *, present: bool = True) -> None:
        """Bind these rows as past, and as present too, of any graph that shares this cache."""
        for name, buffer in zip(self.values.kv_names, self.buffers):
            buffer.bind(binding, name, self._first, self.batch, present=present)

    def write(self, states: list[NDArray[Any]]) -> None:
        """Put keys and values ``[batch, new, kv_heads x head_size]`` after those that are there.

        They come in the order of ``kv_names``; the caller counts them.
        """
        facts = self.manifest.model
        for buffer, rows in zip(self.buffers, states):
            batch, new, _ = rows.shape
            heads = rows.reshape(batch, new, facts.num_key_value_heads, facts.head_size).swapaxes(1, 2)
            for row, length in enumerate(self.lengths.tolist()):
                buffer.write(self._first + row, length, heads[row])

    def copy_out(self, row: int, start: int, stop: int) -> list[NDArray[Any]]:
        assert stop <= self.lengths[row]
        return [buffer.read(self._first + row, stop)[:, start:].copy() for buffer in self.buffers]

    def copy_in(self, row: int, start: int, states: list[NDArray[Any]]) -> None:
        target, length = self.rows(row, 1), states[0].shape[1]
        target.trim(start)
        target.reserve(length)
        for buffer, each in zip(self.buffers, states):
            buffer.write(self._first + row, start, each)
        target.advance(length)

    def _reallocate(self, capacity: int) -> None:
        facts = self.manifest.model
        shape = (self.batch, facts.num_key_value_heads, capacity, facts.head_size)
        # All new buffers are made before an old one is given up, so that nothing changes if memory runs out.
        grown = [Buffer(self.values, shape) for _ in self.values.kv_names]
        for old, new in zip(self._buffers, grown):
            for row, length in enumerate(self.lengths.tolist()):
                if length:
                    new.write(row, 0, old.read(row, length))
        self._buffers = grown

    def _show(self, first: int, count: int) -> Self:
        return type(self)(self.values, self.inference, count, pool=self.pool, first=self._first + first)


class GrowingKVCache(OrtKVCache):
    """Every run returns tensors that are longer by the new tokens, as optimum runs the same graph."""

    def __init__(self, values: Values, inference: Any, batch: int) -> None:
        super().__init__(values, inference, batch)
        facts = values.manifest.model
        self._empty = np.zeros((batch, facts.num_key_value_heads, 0, facts.head_size), dtype=values.kv_dtype)
        self._cut: list[NDArray[Any]] = []
        self._past: list[Any] = [values.allocate(self._empty) for _ in values.kv_names]

    def bind(self, new: int, logits: str) -> Any:
        for name, value in zip(self.values.kv_names, self._past):
            self._binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            self._binding.bind_output(f"present.{name}", self.values.device_type)
        return super().bind(new, logits)

    def collect(self) -> None:
        # Outputs come back in the order in which they were first bound: present.* before logits.
        self._past = self._binding.get_outputs()[: len(self._past)]
        self._cut = []

    def trim(self, length: int) -> None:
        super().trim(length)
        self._cut_back()

    def put_back(self, lengths: NDArray[np.int64]) -> None:
        changed = not np.array_equal(self.lengths, lengths)
        super().put_back(lengths)
        if changed:
            self._cut_back()

    def _cut_back(self) -> None:
        self._cut = [np.ascontiguousarray(value.numpy()[:, :, : self.length]) for value in self._past]
        self._past = [self.values.allocate(array) for array in self._cut]

    def _reallocate(self, capacity: int) -> None:
        """Nothing to do: a run allocates what it returns."""
