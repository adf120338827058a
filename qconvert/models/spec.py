"""What a decoder is, as data: its sizes, and what it has where families differ."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DecoderSpec:
    """The sizes of one decoder; ``families.spec_of`` takes them from a configuration.

    ``sliding_windows`` holds, layer by layer, the number of tokens that a query sees (itself
    included), or None for the whole context. ``context_length`` is in tokens. ``qkv_bias``: the projections
    of query, key and value have biases. ``qk_norm``: every head of query and key is normed before it is
    rotated. ``model_type`` is the family's name in config.json.
    """

    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_size: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    context_length: int
    sliding_windows: tuple[int | None, ...]
    qkv_bias: bool = True
    qk_norm: bool = False
    model_type: str = "qwen2"

    @property
    def query_size(self) -> int:
        """Features of all query heads together."""
        return self.num_attention_heads * self.head_size

    @property
    def kv_size(self) -> int:
        """Features of all key heads together, and of all value heads."""
        return self.num_key_value_heads * self.head_size
