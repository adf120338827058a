"""Llama: no biases; from Llama 3.1 on low frequencies of the rotary embedding are stretched (``llama3``)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qconvert.models.family import Family, Unsupported, unsupported_biases, unsupported_mlp_or_rope


def _unsupported(config: Any) -> Iterator[Unsupported]:
    yield from unsupported_mlp_or_rope(config)
    yield from unsupported_biases(config, "attention_bias", "mlp_bias")


LLAMA = Family(
    name="Llama",
    model_type="llama",
    models="Llama 2, 3, 3.1 and 3.2 (1B, 3B), TinyLlama, SmolLM2, DeepSeek-R1-Distill-Llama",
    qkv_bias=False,
    qk_norm=False,
    windows=False,
    unsupported=_unsupported,
)
