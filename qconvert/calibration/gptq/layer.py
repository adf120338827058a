"""One decoder layer in float32 by transformers' own modules, taken apart where its weights are rounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from qconvert.calibration.statistics import window_mask
from qconvert.checkpoint.weights import CheckpointWeights
from qconvert.models.families import family_of, spec_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Rope = tuple[torch.Tensor, torch.Tensor]


class Layer:
    """A layer whose linear weights can be exchanged. Several threads may compute with it.

    Features are float32 ``[sequences, tokens, hidden_size]``.

    Attributes:
        linears: the seven linear modules by their names in the checkpoint's layer.
    """

    def __init__(self, config: PreTrainedConfig, index: int, weights: CheckpointWeights, rope: Rope) -> None:
        with torch.device("meta"):
            decoder_layer = family_of(config).transformers_class("DecoderLayer")
            module: Any = decoder_layer(config, index).eval().requires_grad_(False)
        prefix = f"model.layers.{index}."
        state = {}
        for name in module.state_dict():
            state[name] = weights[prefix + name].float().clone()
            weights.release(prefix + name)
        module.load_state_dict(state, assign=True)
        self.linears: dict[str, torch.nn.Linear] = {
            name: part for name, part in module.named_modules() if isinstance(part, torch.nn.Linear)
        }
        # With o_proj an identity, attention returns o_proj's input.
        module.self_attn.o_proj = torch.nn.Identity()
        self._module, self._rope = module, rope
        self._mask = window_mask(rope[0].shape[1], spec_of(config).sliding_windows[index])

    def attention_input(self, hidden: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self._module.input_layernorm(hidden)
        return normed

    def context(self, hidden: torch.Tensor) -> torch.Tensor:
        """What attention hands to ``o_proj``."""
        context: torch.Tensor = self._module.self_attn(
            self.attention_input(hidden), position_embeddings=self._rope, attention_mask=self._mask
        )[0]
        return context

    def attention(self, hidden: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.linears["self_attn.o_proj"](self.context(hidden))
        return output

    def mlp_input(self, hidden: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self._module.post_attention_layernorm(hidden)
        return normed

    def gated(self, hidden: torch.Tensor) -> torch.Tensor:
        """What ``down_proj`` multiplies."""
        mlp, normed = self._module.mlp, self.mlp_input(hidden)
        gated: torch.Tensor = mlp.act_fn(mlp.gate_proj(normed)) * mlp.up_proj(normed)
        return gated

    def mlp(self, hidden: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.linears["mlp.down_proj"](self.gated(hidden))
        return output


Reads = Callable[[Layer, torch.Tensor], torch.Tensor]
# In the order of computation: tensors that are multiplied with one input, a function that computes this
# input, and one (or None) that computes what is added to the residual stream once they are rounded.
STAGES: tuple[tuple[tuple[str, ...], Reads, Reads | None], ...] = (
    (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), Layer.attention_input, None),
    (("self_attn.o_proj",), Layer.context, Layer.attention),
    (("mlp.gate_proj", "mlp.up_proj"), Layer.mlp_input, None),
    (("mlp.down_proj",), Layer.gated, Layer.mlp),
)
