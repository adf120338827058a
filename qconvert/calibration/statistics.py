"""One pass of a text through the decoder, a layer at a time: what the inputs of its products are like.

The residual stream and the norms stay in float32. What lies between them is bfloat16 where the processor
multiplies it: products are six times as fast, and the rounding is far smaller than the difference between
two texts. Memory: the text's hidden states, what lies between a layer's matrices for some sequences, and one
layer's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import torch

from qconvert.checkpoint.weights import CheckpointWeights
from qconvert.formats.folding import Weights
from qconvert.models.families import family_of, spec_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from qconvert.checkpoint.reference import KVObserver

EMBEDDING = "model.embed_tokens.weight"
# Tokens that are computed together: between gate_proj and down_proj of a 7B model they take 0.5 GB.
_BATCH_TOKENS = 2048
# Pieces in which the rows of symmetric products are computed: none has what lies before its first column.
_STRIPS = 4
# Tokens whose inputs are kept as they are, spread over the text.
_KEPT = 64

Look = Callable[[torch.Tensor], None]


class Watcher(Protocol):
    """Looks at a pass beside the one for whom it is made; see ``observer.Observer``."""

    @property
    def kv(self) -> KVObserver | None:
        """What sees keys and values, if anything does."""
        ...

    def looks(self, layer: int) -> Mapping[str, Look]:
        """What looks at the inputs of products, as ``Pass.layer`` takes it."""
        ...


class InputStatistics:
    """What the inputs x ``[K]`` of one product are like over the text.

    Args:
        columns: K.
        group: columns whose products with one another are wanted; a last group may be shorter.
        tokens: of the whole text.
    """

    def __init__(self, columns: int, group: int, tokens: int) -> None:
        whole, rest = divmod(columns, group)
        # Of products that are symmetric, what is above the diagonal.
        self._products = [torch.zeros(whole, group, group), torch.zeros(int(rest > 0), rest, rest)]
        self._whole, self._tokens = whole * group, tokens
        self._kept: list[torch.Tensor] = []
        self._every = max(1, tokens // _KEPT)

    def add(self, inputs: torch.Tensor) -> None:
        """Look at some tokens, float32 ``[tokens, K]``."""
        for total, part in zip(self._products, (inputs[:, : self._whole], inputs[:, self._whole :])):
            if len(total):
                groups = part.reshape(len(part), len(total), -1).transpose(0, 1)
                step = -(-total.shape[1] // _STRIPS)
                for start in range(0, total.shape[1], step):
                    rows = groups[:, :, start : start + step].transpose(1, 2)
                    total[:, start : start + step, start:].baddbmm_(rows, groups[:, :, start:])
        self._kept.append(inputs[:: self._every].clone())

    @property
    def products(self) -> list[torch.Tensor]:
        """Mean of x x^T inside each group ``[groups, group, group]``, and in the rest ``[1, rest, rest]``."""
        halves = [(total / self._tokens).triu_() for total in self._products if len(total)]
        return [half + half.triu(1).transpose(1, 2) for half in halves]

    @property
    def squares(self) -> torch.Tensor:
        """Mean of x^2, ``[K]``."""
        return (
            torch.cat([total.diagonal(dim1=1, dim2=2).flatten() for total in self._products]) / self._tokens
        )

    @property
    def sample(self) -> torch.Tensor:
        """Some of the inputs, ``[n, K]``."""
        return torch.cat(self._kept)


class Pass:
    """The state of a text between two layers.

    Args:
        model: the checkpoint, of any type; nothing of it is changed.
        sequences: token ids, all of one length.
        watcher: looks at every layer too.
    """

    def __init__(
        self, model: PreTrainedModel, sequences: Sequence[Sequence[int]], watcher: Watcher | None = None
    ) -> None:
        self._config, self._watcher = model.config, watcher
        self._weights = CheckpointWeights(model)
        tokens = torch.tensor(sequences)
        self.tokens = tokens.numel()
        occurring, places = torch.unique(tokens, return_inverse=True)
        self._hidden = self._weights[EMBEDDING][occurring].float()[places]
        self._weights.release(EMBEDDING)
        with torch.no_grad():
            rotary = family_of(model.config).transformers_class("RotaryEmbedding")(model.config)
            tables = rotary(self._hidden, torch.arange(tokens.shape[1])[None])
            self._rope = tuple(table.to(product_dtype()) for table in tables)

    def layer(self, index: int, looks: Mapping[str, Look] = MappingProxyType({})) -> None:
        """Compute one layer; layers are to be asked for in order, each once.

        Args:
            index: of the layer.
            looks: by the name of a product in the layer ("mlp.down_proj"), what is called with its inputs,
                float32 ``[tokens, K]``, some sequences at a time.
        """
        module, watcher = layer_module(self._config, index, self._weights), self._watcher
        for name, look in [*looks.items(), *(watcher.looks(index).items() if watcher else ())]:
            module.get_submodule(name).register_forward_pre_hook(_telling(look))
        mask = window_mask(self._hidden.shape[1], spec_of(self._config).sliding_windows[index])
        step = max(1, _BATCH_TOKENS // self._hidden.shape[1])
        with torch.no_grad():
            for start in range(0, len(self._hidden), step):
                part = slice(start, start + step)
                hidden = self._hidden[part]
                cache = watcher.kv.cache([hidden.shape[1]] * len(hidden)) if watcher and watcher.kv else None
                self._hidden[part] = module(
                    hidden, position_embeddings=self._rope, attention_mask=mask, past_key_values=cache
                )

    def final(self, look: Look) -> None:
        """After the last layer: ``look`` gets what the head multiplies, some tokens at a time."""
        norm = final_norm(self._config, self._weights)
        with torch.no_grad():
            for hidden in self._hidden:
                look(norm(hidden))


class Product(torch.nn.Module):
    """A linear layer that takes any type, and multiplies and gives that of its weight.

    Attributes:
        weight: ``[N, K]``, which may be exchanged.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight, self._bias = weight, bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(inputs.to(self.weight.dtype), self.weight, self._bias)


def layer_module(config: PreTrainedConfig, index: int, weights: Weights) -> Any:
    """transformers' layer with each linear module a ``Product`` in ``product_dtype``."""
    with torch.device("meta"):
        decoder_layer = family_of(config).transformers_class("DecoderLayer")
        module: Any = decoder_layer(config, index).eval().requires_grad_(False)
    prefix, dtype = f"model.layers.{index}.", product_dtype()
    for name, part in list(module.named_modules()):
        if isinstance(part, torch.nn.Linear):
            owner, _, child = name.rpartition(".")
            bias = None if part.bias is None else weights[f"{prefix}{name}.bias"].to(dtype)
            product = Product(weights[f"{prefix}{name}.weight"].to(dtype), bias)
            setattr(module.get_submodule(owner), child, product)
        else:
            # Norms of heads lie between products, the others before them.
            norm_dtype = dtype if name.startswith("self_attn.") else torch.float32
            for child, _ in list(part.named_parameters(recurse=False)):
                value = weights[f"{prefix}{name}.{child}"].to(norm_dtype)
                setattr(part, child, torch.nn.Parameter(value, requires_grad=False))
    return module


def final_norm(config: PreTrainedConfig, weights: Weights) -> Callable[[torch.Tensor], torch.Tensor]:
    """transformers' norm before the head, in float32."""
    norm: Any = family_of(config).transformers_class("RMSNorm")(config.hidden_size, config.rms_norm_eps)
    norm.weight = torch.nn.Parameter(weights["model.norm.weight"].float(), requires_grad=False)
    return norm  # type: ignore[no-any-return]


def product_dtype() -> torch.dtype:
    """bfloat16 where the processor multiplies it, else float32."""
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def window_mask(length: int, window: int | None) -> torch.Tensor | None:
    """Which tokens a query sees, bool ``[1, 1, length, length]``; None: all before it."""
    if window is None or window >= length:
        return None
    position = torch.arange(length)
    behind = position[:, None] - position[None]
    return ((behind >= 0) & (behind < window))[None, None]


def _telling(look: Look) -> Callable[[Any, tuple[torch.Tensor]], None]:
    return lambda _, arguments: look(arguments[0].flatten(0, 1).float())
