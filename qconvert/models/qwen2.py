"""Qwen2: query, key and value have biases."""

from __future__ import annotations

from qconvert.models.family import Family, unsupported_mlp_or_rope

QWEN2 = Family(
    name="Qwen2",
    model_type="qwen2",
    models="Qwen2, Qwen2.5, Qwen2.5-Coder, Qwen2.5-Math, QwQ-32B, DeepSeek-R1-Distill-Qwen",
    qkv_bias=True,
    qk_norm=False,
    windows=True,
    unsupported=unsupported_mlp_or_rope,
)
