"""What a family of models says of itself: how its decoder differs, which configurations are covered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, NamedTuple

from qconvert.models.spec import DecoderSpec

TransformersClass = Literal["Config", "ForCausalLM", "RotaryEmbedding", "DecoderLayer", "RMSNorm"]


class Unsupported(NamedTuple):
    """One value of config.json that an export does not cover."""

    key: str
    value: object
    why: str


@dataclass(frozen=True)
class Family:
    """One architecture: a decoder with Llama's layers, apart from what is stated here.

    Attributes:
        name: the beginning of transformers' class names: "Qwen2".
        model_type: as in config.json, which is also transformers' name for the module: "qwen2".
        models: well-known models of this family, for messages.
        qkv_bias: see ``DecoderSpec``.
        qk_norm: likewise.
        windows: config.json can give layers sliding windows; where it cannot, keys of that name mean nothing.
        unsupported: the values of a configuration (``transformers_class("Config")``) that are not covered.
    """

    name: str
    model_type: str
    models: str
    qkv_bias: bool
    qk_norm: bool
    windows: bool
    unsupported: Callable[[Any], Iterator[Unsupported]]

    @property
    def architecture(self) -> str:
        """As config.json's ``architectures`` has it."""
        return f"{self.name}ForCausalLM"

    def transformers_class(self, ending: TransformersClass) -> Any:
        """transformers' class for a part of this family."""
        kind = "configuration" if ending == "Config" else "modeling"
        module = import_module(f"transformers.models.{self.model_type}.{kind}_{self.model_type}")
        return getattr(module, f"{self.name}{ending}")

    def spec(self, config: Any) -> DecoderSpec:
        """The sizes in a configuration that ``checkpoint/config.py`` has checked."""
        rope = config.rope_parameters
        context_length = config.max_position_embeddings
        if rope["rope_type"] == "yarn":  # checkpoints may state the context before or after stretching
            original = rope.get("original_max_position_embeddings") or context_length
            context_length = max(context_length, int(rope["factor"] * original))
        return DecoderSpec(
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_size=head_size(config),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            rms_norm_eps=config.rms_norm_eps,
            tie_word_embeddings=config.tie_word_embeddings,
            context_length=context_length,
            sliding_windows=self._sliding_windows(config),
            qkv_bias=self.qkv_bias,
            qk_norm=self.qk_norm,
            model_type=self.model_type,
        )

    def _sliding_windows(self, config: Any) -> tuple[int | None, ...]:
        if not self.windows:
            return (None,) * int(config.num_hidden_layers)
        return tuple(
            config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types
        )


def unsupported_mlp_or_rope(config: Any) -> Iterator[Unsupported]:
    """What no family here covers: another activation than silu, heads that are rotated in part."""
    if config.hidden_act != "silu":
        yield Unsupported("hidden_act", config.hidden_act, "the MLP uses silu")
    share = config.rope_parameters.get("partial_rotary_factor", 1.0)
    if share != 1.0:
        yield Unsupported("partial_rotary_factor", share, "whole heads are rotated")


def unsupported_biases(config: Any, *keys: str) -> Iterator[Unsupported]:
    """Flags of a configuration that give biases to projections which have none in this family."""
    for key in keys:
        if getattr(config, key):
            yield Unsupported(key, getattr(config, key), "the projections of this family have no biases here")


def head_size(config: Any) -> int:
    """Width of one attention head: ``head_dim`` where the config has it, else hidden size / heads."""
    explicit = getattr(config, "head_dim", None)
    return int(explicit or config.hidden_size // config.num_attention_heads)
