"""The KV caches of an ONNX Runtime session: buffers that a graph writes in place, or tensors that grow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qrun.backends.kvcache import KVCache

if TYPE_CHECKING:
    from qrun.backends.ort.prefill import PrefillBinding
    from qrun.backends.ort.session import OrtSession


class OrtKVCache(KVCache):
    """What both kinds of cache share: the binding, and the buffers for tokens, mask and logits."""

    def __init__(self, session: OrtSession, batch: int) -> None:
        super().__init__(session.manifest, batch)
        self.session = session
        self._binding = session.binding()
        self._ones = np.ones((batch, 1), dtype=np.int64)
        self._tokens: NDArray[np.int64] = np.empty((batch, 0), dtype=np.int64)
        self._logits: NDArray[np.float32] = np.empty((batch, 0, 0), dtype=np.float32)
        self._bound: tuple[int, str] | None = None

    def bind(self, new: int, logits: str) -> Any:
        """Bind everything for ``new`` tokens; what has not changed since the last call stays bound."""
        if self._bound != (new, logits):
            self._bind_sizes(new, logits)
            self._bound = (new, logits)
        self._binding.bind_ortvalue_input("attention_mask", self.session.value(self.attention_mask(new)))
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
        positions = {"last": 1, "all": new, "none": 0}[logits]
        self._logits = np.empty((self.batch, positions, self.manifest.model.vocab_size), dtype=np.float32)
        self._binding.bind_ortvalue_input("input_ids", self.session.value(self._tokens))
        self._binding.bind_ortvalue_input("logits_start", self.session.positions(logits))
        self._binding.bind_ortvalue_output("logits", self.session.value(self._logits))

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

    def __init__(self, session: OrtSession, batch: int) -> None:
        super().__init__(session, batch)
        self._buffers: list[Any] = []
        self.prefill: PrefillBinding | None = None

    def _reallocate(self, capacity: int) -> None:
        facts = self.manifest.model
        shape = (self.batch, facts.num_key_value_heads, capacity, facts.head_size)
        filled = self.length
        for index in range(len(self.session.kv_names)):
            # Pages of a zeroed array take no memory until they are written.
            grown = np.zeros(shape, dtype=self.session.kv_dtype)
            if filled:
                grown[:, :, :filled] = _as_array(self._buffers[index])[:, :, :filled]
            value = self.session.allocate(grown)
            if index < len(self._buffers):
                self._buffers[index] = value
            else:
                self._buffers.append(value)
        self.bind_buffers(self._binding)

    def bind_buffers(self, binding: Any, *, present: bool = True) -> None:
        """Bind the buffers as past, and as present too, of any graph that shares this cache."""
        for name, value in zip(self.session.kv_names, self._buffers):
            binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            if present:
                binding.bind_ortvalue_output(f"present.{name}", value)

    def write(self, states: list[NDArray[Any]]) -> None:
        """Put keys and values ``[batch, new, kv_heads x head_size]`` behind those that are there.

        They come in the order of ``kv_names``; the caller counts them.
        """
        facts, filled = self.manifest.model, self.length
        for value, rows in zip(self._buffers, states):
            batch, new, _ = rows.shape
            heads = rows.reshape(batch, new, facts.num_key_value_heads, facts.head_size)
            _as_array(value)[:, :, filled : filled + new] = heads.transpose(0, 2, 1, 3)


class GrowingKVCache(OrtKVCache):
    """Every run returns tensors that are longer by the new tokens, as optimum runs the same graph."""

    def __init__(self, session: OrtSession, batch: int) -> None:
        super().__init__(session, batch)
        facts = session.manifest.model
        empty = np.zeros((batch, facts.num_key_value_heads, 0, facts.head_size), dtype=session.kv_dtype)
        self._past: list[Any] = [session.allocate(empty) for _ in session.kv_names]

    def _reallocate(self, capacity: int) -> None:
        """Nothing to do: a run allocates what it returns."""

    def bind(self, new: int, logits: str) -> Any:
        for name, value in zip(self.session.kv_names, self._past):
            self._binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            self._binding.bind_output(f"present.{name}", self.session._device_type)
        return super().bind(new, logits)

    def collect(self) -> None:
        # Outputs come back in the order in which they were first bound: present.* before logits.
        self._past = self._binding.get_outputs()[: len(self._past)]

    def trim(self, length: int) -> None:
        super().trim(length)
        self._past = [
            self.session.allocate(np.ascontiguousarray(_as_array(value)[:, :, :length]))
            for value in self._past
        ]


def _as_array(value: Any) -> NDArray[Any]:
    array: NDArray[Any] = value.numpy()
    return array
