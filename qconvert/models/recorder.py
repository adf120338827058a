"""Which tensors a decoder uses: their groups, found by lowering it to nothing, and their shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from qconvert.models.decoder import lower_decoder
from qconvert.models.spec import DecoderSpec

LowerDecoder = Callable[[DecoderSpec, Any], None]


def tensor_groups(spec: DecoderSpec, lower: LowerDecoder = lower_decoder) -> list[tuple[str, ...]]:
    """Every tensor that the decoder uses, those that are multiplied side by side together."""
    recorder = _Recorder()
    lower(spec, recorder)
    return list(dict.fromkeys(recorder.groups))


def expected_tensors(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a decoder has; a tied head is not among them."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (spec.vocab_size, hidden)}
    for layer in range(spec.num_hidden_layers):
        block = f"model.layers.{layer}"
        for name, width in (("q_proj", spec.query_size), ("k_proj", spec.kv_size), ("v_proj", spec.kv_size)):
            shapes[f"{block}.self_attn.{name}.weight"] = (width, hidden)
            if spec.qkv_bias:
                shapes[f"{block}.self_attn.{name}.bias"] = (width,)
        if spec.qk_norm:
            shapes |= {f"{block}.self_attn.{part}_norm.weight": (spec.head_size,) for part in "qk"}
        shapes[f"{block}.self_attn.o_proj.weight"] = (hidden, spec.query_size)
        shapes[f"{block}.mlp.gate_proj.weight"] = (inner, hidden)
        shapes[f"{block}.mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{block}.mlp.down_proj.weight"] = (hidden, inner)
        shapes[f"{block}.input_layernorm.weight"] = (hidden,)
        shapes[f"{block}.post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not spec.tie_word_embeddings:
        shapes["lm_head.weight"] = (spec.vocab_size, hidden)
    return shapes


class _Recorder:
    """A lowering that builds no graph and records the tensors that the decoder names."""

    def __init__(self) -> None:
        self.groups: list[tuple[str, ...]] = []

    def embed(self, weight: str) -> None:
        self.groups.append((weight,))

    def add_and_norm(self, residual: None, delta: None, weight: str) -> tuple[None, None]:
        self.groups.append((weight,))
        return None, None

    def linear(self, hidden: None, weights: Sequence[str], biases: Sequence[str] = ()) -> None:
        self.groups += [tuple(weights), *([tuple(biases)] if biases else [])]

    def norm_heads(self, qkv: None, query_weight: str, key_weight: str) -> None:
        self.groups += [(query_weight,), (key_weight,)]

    def attention(self, qkv: None, layer: int) -> None: ...

    def gated_silu(self, gate: None, up: None) -> None: ...

    def requested_positions(self, hidden: None) -> None: ...

    def head(self, hidden: None, weight: str) -> None:
        self.groups.append((weight,))
