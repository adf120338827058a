"""Qwen2: query, key and value have biases."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qconvert.models.family import Family, Unsupported


def _unsupported(config: Any) -> Iterator[Unsupported]:
    if config.hidden_act != "silu":
        yield Unsupported("hidden_act", config.hidden_act, "Qwen2's MLP uses silu")
    share = config.rope_parameters.get("partial_rotary_factor", 1.0)
    if share != 1.0:
        yield Unsupported("partial_rotary_factor", share, "Qwen2 rotates whole heads")


QWEN2 = Family(
    name="Qwen2",
    model_type="qwen2",
    models="Qwen2, Qwen2.5, Qwen2.5-Coder, Qwen2.5-Math, QwQ-32B, DeepSeek-R1-Distill-Qwen",
    qkv_bias=True,
    qk_norm=False,
    unsupported=_unsupported,
)
