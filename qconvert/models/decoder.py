"""The Qwen2 decoder, written once, in the checkpoint's own names.

It knows what is multiplied by what, and nothing of any runtime: a ``Lowering`` turns each verb into
the operators of one runtime. Compare with ``modeling_qwen2.py`` of transformers, which this mirrors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

V = TypeVar("V")


@dataclass(frozen=True)
class DecoderSpec:
    """The sizes of one Qwen2 decoder, taken from its ``Qwen2Config``.

    ``sliding_windows`` holds, layer by layer, the number of tokens that a query sees (itself
    included), or None for the whole context. ``context_length`` is in tokens.
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

    @classmethod
    def from_config(cls, config: Any) -> DecoderSpec:
        """Take the sizes from a ``transformers.Qwen2Config`` that ``checkpoint/config.py`` has checked."""
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        rope = config.rope_parameters
        context_length = config.max_position_embeddings
        if rope["rope_type"] == "yarn":  # checkpoints may state the context before or after stretching
            original = rope.get("original_max_position_embeddings") or context_length
            context_length = max(context_length, int(rope["factor"] * original))
        return cls(
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_size=head_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            rms_norm_eps=config.rms_norm_eps,
            tie_word_embeddings=config.tie_word_embeddings,
            context_length=context_length,
            sliding_windows=tuple(
                config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types
            ),
        )

    @property
    def query_size(self) -> int:
        return self.num_attention_heads * self.head_size

    @property
    def kv_size(self) -> int:
        return self.num_key_value_heads * self.head_size


def rope_tables(config: Any, length: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines of the rotary embedding, from transformers' own rope functions.

    Returns:
        Two float32 arrays ``[length, head_size / 2]``, the scaling of YaRN included.
    """
    import torch
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    rotary = Qwen2RotaryEmbedding(config)
    with torch.no_grad():
        cos, sin = rotary(torch.zeros(1, dtype=torch.float32), torch.arange(length)[None])
    half = cos.shape[-1] // 2  # transformers repeats each angle for both halves of a head
    return cos[0, :, :half].contiguous().numpy(), sin[0, :, :half].contiguous().numpy()


class Lowering(Protocol[V]):
    """What the decoder asks of a runtime. ``V`` is a value in that runtime's graph.

    Every ``weight`` and ``bias`` is a tensor name of the checkpoint. Shapes are
    ``[batch, seq, features]`` throughout.
    """

    def embed(self, weight: str) -> V:
        """Rows of the embedding for the graph's ``input_ids``."""
        ...

    def add_and_norm(self, residual: V, delta: V | None, weight: str) -> tuple[V, V]:
        """``residual + delta`` (or residual alone) and its RMS norm, in this order."""
        ...

    def linear(self, hidden: V, weights: Sequence[str], biases: Sequence[str] = ()) -> V:
        """One product with the given weights side by side: ``[.., sum of their output sizes]``."""
        ...

    def attention(self, qkv: V, layer: int) -> V:
        """Rotary embedding, KV cache and causal attention of a layer, from packed q, k and v."""
        ...

    def gated_silu(self, gate: V, up: V) -> V:
        """``silu(gate) * up``."""
        ...

    def requested_positions(self, hidden: V) -> V:
        """The positions for which the caller wants logits."""
        ...

    def head(self, hidden: V, weight: str) -> None:
        """Logits, as the graph's output."""
        ...


def lower_decoder(spec: DecoderSpec, lowering: Lowering[V]) -> None:
    """Describe the whole decoder to a lowering."""
    residual, delta = lowering.embed("model.embed_tokens.weight"), None
    last = spec.num_hidden_layers - 1
    for layer in range(spec.num_hidden_layers):
        residual, delta = _attention_block(lowering, residual, delta, layer)
        if layer == last:
            # Nothing after the last attention looks at other positions: drop those nobody asked for.
            residual, delta = lowering.requested_positions(residual), lowering.requested_positions(delta)
        residual, delta = _mlp_block(lowering, residual, delta, layer)
    _, hidden = lowering.add_and_norm(residual, delta, "model.norm.weight")
    lowering.head(hidden, "model.embed_tokens.weight" if spec.tie_word_embeddings else "lm_head.weight")


def lower_prompt(spec: DecoderSpec, lowering: Lowering[V]) -> None:
    """Describe what a prompt needs whose last token goes through another graph: all keys and values.

    That is the decoder up to the last layer's attention; its result, the last MLP and the head are
    looked at for the last token only.
    """
    residual, delta = lowering.embed("model.embed_tokens.weight"), None
    last = spec.num_hidden_layers - 1
    for layer in range(last):
        residual, delta = _attention_block(lowering, residual, delta, layer)
        residual, delta = _mlp_block(lowering, residual, delta, layer)
    _, hidden = lowering.add_and_norm(residual, delta, _norm(last, "input"))
    lowering.attention(_qkv(lowering, hidden, last), last)


def _attention_block(lowering: Lowering[V], residual: V, delta: V | None, layer: int) -> tuple[V, V]:
    residual, hidden = lowering.add_and_norm(residual, delta, _norm(layer, "input"))
    context = lowering.attention(_qkv(lowering, hidden, layer), layer)
    return residual, lowering.linear(context, [f"model.layers.{layer}.self_attn.o_proj.weight"])


def _mlp_block(lowering: Lowering[V], residual: V, delta: V, layer: int) -> tuple[V, V]:
    residual, hidden = lowering.add_and_norm(residual, delta, _norm(layer, "post_attention"))
    return residual, _mlp(lowering, hidden, f"model.layers.{layer}.mlp")


def _norm(layer: int, place: str) -> str:
    return f"model.layers.{layer}.{place}_layernorm.weight"


def _qkv(lowering: Lowering[V], hidden: V, layer: int) -> V:
    projections = [f"model.layers.{layer}.self_attn.{part}_proj" for part in "qkv"]
    return lowering.linear(hidden, [f"{p}.weight" for p in projections], [f"{p}.bias" for p in projections])


def _mlp(lowering: Lowering[V], hidden: V, name: str) -> V:
    gate = lowering.linear(hidden, [f"{name}.gate_proj.weight"])
    up = lowering.linear(hidden, [f"{name}.up_proj.weight"])
    return lowering.linear(lowering.gated_silu(gate, up), [f"{name}.down_proj.weight"])
