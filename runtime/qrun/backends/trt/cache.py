"""The KV cache of a plan: allocated once on the GPU at the plan's static length, written in place."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from math import prod

import numpy as np
from numpy.typing import NDArray

from qrun.backends.kvcache import KVCache
from qrun.backends.trt.cuda import Device, DeviceBuffer, Stream
from qrun.backends.trt.engine import Engine
from qrun.errors import QrunError
from qrun.folder.manifest import Manifest, forecast_bytes


class TrtKVCache(KVCache):
    """Keys and values of one sequence.

    Attributes:
        engine: of the plan whose cache it is.
        logits: float32 ``[1, 1, vocab]`` of its last token: the cache's own, so that what is fed to another
            one leaves them alone.
        buffers: by the name of the past_key_values input; empty until the first token.
    """

    in_host_memory = False

    def __init__(self, manifest: Manifest, engine: Engine, gpu: Device, stream: Stream) -> None:
        super().__init__(manifest)
        self.engine = engine
        self.logits: NDArray[np.float32] = np.empty((1, 1, manifest.model.vocab_size), dtype=np.float32)
        self._gpu = gpu
        self._stream = stream
        self.buffers: dict[str, DeviceBuffer] = {}
        self._closing = weakref.finalize(self, _close, self.buffers)

    def reserve(self, new_tokens: int, *, spare: int | None = None) -> None:
        self.check_limit(self.length + new_tokens)
        if not self.capacity:
            self._reallocate(self.limit)
            self._capacity = self.limit

    def close(self) -> None:
        """Give the GPU's memory back; nothing can be fed any more."""
        self._closing()

    def _reallocate(self, capacity: int) -> None:
        assert self._closing.alive, "the cache is closed"
        cost, free = forecast_bytes(self.manifest, capacity), self._gpu.free_bytes()
        if cost > free:
            raise QrunError(
                f"a KV cache of {capacity:,} tokens needs {cost / 1e9:.2f} GB of the GPU's memory, "
                f"{free / 1e9:.2f} GB are free",
                hint="close other programs on the GPU, or export with a shorter --max-length",
            )
        try:
            for name in self.engine.caches:
                buffer = DeviceBuffer(prod(self.engine.cache_shape(name)) * self.engine.item_size(name))
                self.buffers[name] = buffer
                # Unfilled positions are masked, but 0 times a NaN would still be NaN.
                self._stream.zero(buffer)
        except QrunError:
            self._stream.synchronize()
            _close(self.buffers)
            raise


def _close(buffers: Mapping[str, DeviceBuffer]) -> None:
    for buffer in buffers.values():
        buffer.close()
