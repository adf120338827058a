"""Configurations of Qwen2.5's and Qwen3's models, as in their config.json, and tiny ones to try with."""

from __future__ import annotations

from typing import Any

_COMMON: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "use_sliding_window": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
    # Those of the byte-level tokenizer that is written beside the weights.
    "bos_token_id": 256,
    "eos_token_id": 258,
}


def _shape(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, **others: Any) -> dict[str, Any]:
    return {
        **_COMMON,
        **others,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


# Heads of 128 whatever the width, normed; no biases.
_QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 128,
    "attention_bias": False,
    "max_position_embeddings": 40960,
}

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _shape(256, 768, 4, 4, 2, vocab_size=8192, max_position_embeddings=4096),
    "0.5b": _shape(896, 4864, 24, 14, 2),
    "1.5b": _shape(1536, 8960, 28, 12, 2),
    "3b": _shape(2048, 11008, 36, 16, 2),
    "7b": _shape(3584, 18944, 28, 28, 4, vocab_size=152_064, tie_word_embeddings=False),
    "qwen3-tiny": _shape(
        256, 768, 4, 4, 2, **{**_QWEN3, "vocab_size": 8192, "max_position_embeddings": 4096, "head_dim": 96}
    ),
    "qwen3-0.6b": _shape(1024, 3072, 28, 16, 8, **_QWEN3),
}


def title_of(shape: str) -> str:
    """A shape's name for people."""
    family = {"qwen2": "Qwen2.5", "qwen3": "Qwen3"}[SHAPES[shape]["model_type"]]
    return f"{family} {shape.removeprefix('qwen3-').upper()}"
