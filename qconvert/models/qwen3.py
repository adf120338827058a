"""Qwen3, dense: no biases; every head of query and key is normed before it is rotated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qconvert.models.family import Family, Unsupported, unsupported_biases, unsupported_mlp_or_rope


def _unsupported(config: Any) -> Iterator[Unsupported]:
    yield from unsupported_mlp_or_rope(config)
    yield from unsupported_biases(config, "attention_bias")


QWEN3 = Family(
    name="Qwen3",
    model_type="qwen3",
    models="Qwen3 (dense, 0.6B to 32B), DeepSeek-R1-0528-Qwen3-8B",
    qkv_bias=False,
    qk_norm=True,
    windows=True,
    unsupported=_unsupported,
)
