"""The decoder, written once for all families, in the checkpoint's own names.

It knows what is multiplied by what, and nothing of any runtime: a ``Lowering`` turns each verb into
the operators of one runtime. Compare with ``modeling_qwen2.py`` of transformers, which this mirrors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from qconvert.models.spec import DecoderSpec

V = TypeVar("V")


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

    def norm_heads(self, qkv: V, query_weight: str, key_weight: str) -> V:
        """Packed q, k and v, each head of q and k replaced by its RMS norm times a weight ``[head_size]``."""
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
        residual, delta = _attention_block(spec, lowering, residual, delta, layer)
        if layer == last:
            # After the last attention no position sees another: drop those whose logits nobody asked for.
            residual, delta = lowering.requested_positions(residual), lowering.requested_positions(delta)
        residual, delta = _mlp_block(lowering, residual, delta, layer)
    _, hidden = lowering.add_and_norm(residual, delta, "model.norm.weight")
    lowering.head(hidden, "model.embed_tokens.weight" if spec.tie_word_embeddings else "lm_head.weight")


def lower_prompt(spec: DecoderSpec, lowering: Lowering[V]) -> None:
    """Describe the graph that fills the KV cache for a prompt; the prompt's last token goes through another.

    It ends with the last layer's keys and values. The result of that layer's attention, its MLP and the head
    are needed for the last token only.
    """
    residual, delta = lowering.embed("model.embed_tokens.weight"), None
    last = spec.num_hidden_layers - 1
    for layer in range(last):
        residual, delta = _attention_block(spec, lowering, residual, delta, layer)
        residual, delta = _mlp_block(lowering, residual, delta, layer)
    _, hidden = lowering.add_and_norm(residual, delta, _norm(last, "input"))
    lowering.attention(_qkv(spec, lowering, hidden, last), last)


def _attention_block(
    spec: DecoderSpec, lowering: Lowering[V], residual: V, delta: V | None, layer: int
) -> tuple[V, V]:
    residual, hidden = lowering.add_and_norm(residual, delta, _norm(layer, "input"))
    context = lowering.attention(_qkv(spec, lowering, hidden, layer), layer)
    return residual, lowering.linear(context, [f"model.layers.{layer}.self_attn.o_proj.weight"])


def _mlp_block(lowering: Lowering[V], residual: V, delta: V, layer: int) -> tuple[V, V]:
    residual, hidden = lowering.add_and_norm(residual, delta, _norm(layer, "post_attention"))
    return residual, _mlp(lowering, hidden, f"model.layers.{layer}.mlp")


def _norm(layer: int, place: str) -> str:
    return f"model.layers.{layer}.{place}_layernorm.weight"


def _qkv(spec: DecoderSpec, lowering: Lowering[V], hidden: V, layer: int) -> V:
    attention = f"model.layers.{layer}.self_attn"
    projections = [f"{attention}.{part}_proj" for part in "qkv"]
    biases = [f"{name}.bias" for name in projections] if spec.qkv_bias else []
    qkv = lowering.linear(hidden, [f"{name}.weight" for name in projections], biases)
    if spec.qk_norm:
        qkv = lowering.norm_heads(qkv, f"{attention}.q_norm.weight", f"{attention}.k_norm.weight")
    return qkv


def _mlp(lowering: Lowering[V], hidden: V, name: str) -> V:
    gate = lowering.linear(hidden, [f"{name}.gate_proj.weight"])
    up = lowering.linear(hidden, [f"{name}.up_proj.weight"])
    return lowering.linear(lowering.gated_silu(gate, up), [f"{name}.down_proj.weight"])
