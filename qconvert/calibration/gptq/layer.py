"""One decoder layer by transformers' own modules, taken apart where its weights are rounded.

Products and what lies between them are in the type of ``statistics.product_dtype``, norms in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qconvert.calibration.statistics import Product, layer_module, window_mask
from qconvert.formats.folding import Weights
from qconvert.models.families import spec_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Rope = tuple[torch.Tensor, torch.Tensor]


class Layer:
    """A layer whose linear weights can be exchanged. Several threads may compute with it.

    The residual stream is float32 ``[sequences, tokens, hidden_size]``.

    Attributes:
        linears: the seven linear modules by their names in the checkpoint's layer.
    """

    def __init__(self, config: PreTrainedConfig, index: int, weights: Weights, rope: Rope) -> None:
        module = layer_module(config, index, weights)
        self.linears: dict[str, Product] = {
            name: part for name, part in module.named_modules() if isinstance(part, Product)
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

    def mlp_input(self, hidden: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self._module.post_attention_layernorm(hidden)
        return normed

    def gated(self, hidden: torch.Tensor) -> torch.Tensor:
        """What ``down_proj`` multiplies."""
        mlp, normed = self._module.mlp, self.mlp_input(hidden)
        gated: torch.Tensor = mlp.act_fn(mlp.gate_proj(normed)) * mlp.up_proj(normed)
        return gated

    def products(self, names: tuple[str, ...], inputs: torch.Tensor) -> torch.Tensor:
        """What these linear modules make of one input, side by side."""
        return torch.cat([self.linears[name](inputs) for name in names], dim=-1)


@dataclass(frozen=True)
class Stage:
    """Matrices that multiply one input.

    Attributes:
        names: of the linear modules.
        reads: computes their input of the residual stream.
        adds: whether the product is added to the residual stream; then there is one matrix.
    """

    names: tuple[str, ...]
    reads: Callable[[Layer, torch.Tensor], torch.Tensor]
    adds: bool


# In the order of computation.
STAGES = (
    Stage(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), Layer.attention_input, adds=False),
    Stage(("self_attn.o_proj",), Layer.context, adds=True),
    Stage(("mlp.gate_proj", "mlp.up_proj"), Layer.mlp_input, adds=False),
    Stage(("mlp.down_proj",), Layer.gated, adds=True),
)
