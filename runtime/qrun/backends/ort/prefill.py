"""A folder's second graph, which reads prompts: the same decoder in faster products, without logits.

It fills the KV cache of the first graph. The last token of a prompt goes through the first graph, since the
second one has neither the last layer's MLP nor the head. So do short prompts, which it would not read faster.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from qrun.backends.ort.cache import InPlaceKVCache, OrtKVCache
from qrun.backends.ort.values import Buffer


class PrefillGraph:
    """The graph, opened or about to be.

    Attributes:
        min_tokens: fewest tokens that it is given at once.

    Args:
        opening: of ONNX Runtime's session.
    """

    def __init__(self, opening: Future[Any], min_tokens: int) -> None:
        self._opening = opening
        self.min_tokens = min_tokens
        self._bindings: WeakKeyDictionary[InPlaceKVCache, PrefillBinding] = WeakKeyDictionary()

    @property
    def inference(self) -> Any:
        """ONNX Runtime's session, once it is open.

        Raises:
            QrunError: it could not be opened.
        """
        return self._opening.result()

    def share(self, new: int, logits: str, cache: OrtKVCache) -> int:
        """How many of ``new`` tokens this graph should read, counted from the first one; 0 for none."""
        if logits == "all" or not isinstance(cache, InPlaceKVCache):
            return 0
        count = new if logits == "none" else new - 1
        return count if count >= self.min_tokens else 0

    def read(self, token_ids: NDArray[np.int64], cache: OrtKVCache) -> None:
        """Append tokens ``[batch, new]`` to a cache that has room for them."""
        assert isinstance(cache, InPlaceKVCache), "share() gives no tokens for another kind of cache"
        binding = self._bindings.get(cache)
        if binding is None:
            binding = self._bindings[cache] = PrefillBinding(self.inference, cache.batch)
        binding.run(token_ids, cache)
        cache.advance(token_ids.shape[1])


class PrefillBinding:
    """What stays bound from one piece of a prompt to the next.

    A graph over a cache of floats writes it in place. One over a cache of 8 bits returns the new tokens'
    keys and values, ``new.{layer}.{key|value}`` ``[batch, new, kv_heads x head_size]``.
    """

    def __init__(self, inference: Any, batch: int) -> None:
        self._inference = inference
        self._binding = inference.io_binding()
        self._buffers: list[Buffer] | None = None
        # ONNX Runtime reads and writes these arrays and does not keep them alive, so they are kept here.
        self._mask: NDArray[np.int64] = np.empty((batch, 0), dtype=np.int64)
        self._tokens: NDArray[np.int64] = np.empty((batch, 0), dtype=np.int64)
        self._returned = [output for output in inference.get_outputs() if output.name.startswith("new.")]
        self._new: list[NDArray[Any]] = []

    def run(self, token_ids: NDArray[np.int64], cache: InPlaceKVCache) -> None:
        """Read ``[batch, new]`` tokens after those that the cache holds."""
        new = token_ids.shape[1]
        if self._buffers is not cache.buffers:
            cache.bind_buffers(self._binding, present=not self._returned)
            self._buffers = cache.buffers
        if self._tokens.shape[1] != new:
            self._tokens = np.empty(token_ids.shape, dtype=np.int64)
            self._binding.bind_ortvalue_input("input_ids", cache.values.value(self._tokens))
            self._bind_returned(token_ids.shape, cache)
        self._tokens[...] = token_ids
        self._mask = cache.attention_mask(new)
        self._binding.bind_ortvalue_input("attention_mask", cache.values.value(self._mask))
        self._inference.run_with_iobinding(self._binding)
        cache.write(self._new)

    def _bind_returned(self, shape: tuple[int, ...], cache: InPlaceKVCache) -> None:
        self._new = [
            np.empty((*shape, output.shape[2]), dtype=cache.values.kv_dtype) for output in self._returned
        ]
        for output, array in zip(self._returned, self._new):
            self._binding.bind_ortvalue_output(output.name, cache.values.value(array))
