"""KV caches for the reference: one records the largest keys and values, one rounds them to 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from transformers.cache_utils import Cache

LARGEST = 127


class Scales(Protocol):
    """The scale of every channel, float32 ``[kv_heads, head_size]``, of a layer's "key" or "value"."""

    def __call__(self, layer: int, part: str) -> torch.Tensor: ...


class Observed:
    """A reference's KV cache that records the largest keys and values and changes nothing.

    ``largest`` has the largest magnitude of every channel, float32 ``[kv_heads, head_size]``, by layer and
    "key" or "value".
    """

    def __init__(self) -> None:
        self.largest: dict[tuple[int, str], torch.Tensor] = {}

    def cache(self, lengths: Sequence[int]) -> Cache:
        """A cache for one batch of sequences of these lengths."""
        import torch

        def look(states: torch.Tensor, layer: int, part: str) -> torch.Tensor:
            real = torch.arange(states.shape[2]) < torch.tensor(lengths)[:, None]  # the rest is padding
            sizes = _lengths_of_pairs(states.float()) if part == "key" else states.abs().float()
            found = sizes.transpose(1, 2)[real].amax(0)
            before = self.largest.get((layer, part))
            self.largest[layer, part] = found if before is None else torch.maximum(before, found)
            return states

        return _passing_cache(look)


class Rounded:
    """A reference's KV cache that rounds as an int8 cache with the given scales does."""

    def __init__(self, scales: Scales) -> None:
        self._scales = scales

    def cache(self, lengths: Sequence[int]) -> Cache:
        def store(states: torch.Tensor, layer: int, part: str) -> torch.Tensor:
            scale = self._scales(layer, part)[:, None, :]
            return (states / scale).round().clamp(-LARGEST - 1, LARGEST) * scale

        return _passing_cache(store)


def _lengths_of_pairs(keys: torch.Tensor) -> torch.Tensor:
    """For each channel, the length of the pair in which it is rotated (channels i and i + head_size / 2)."""
    first, second = keys.chunk(2, dim=-1)
    lengths = (first.square() + second.square()).sqrt()
    return lengths.repeat(*[1] * (keys.dim() - 1), 2)


def _passing_cache(change: Callable[[torch.Tensor, int, str], torch.Tensor]) -> Cache:
    """A cache for one forward pass: attention gets keys and values as ``change`` returns them."""
    from transformers import DynamicCache

    class PassingCache(DynamicCache):  # type: ignore[misc]  # transformers is not checked
        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return change(key_states, layer_idx, "key"), change(value_states, layer_idx, "value")

    return PassingCache()
