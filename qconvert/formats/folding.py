"""Factors moved from a product's inputs into its weights, so that both round well.

x W^T = (x / f) (W f)^T. Dividing costs nothing where the input comes from a norm or from another
matrix: ``input_layernorm`` and ``post_attention_layernorm`` are divided, of ``down_proj``'s input the rows
of ``up_proj``, and of ``o_proj``'s input the rows of ``v_proj`` with their biases. The model computes the
same numbers, up to rounding.

Sources: Xiao et al., SmoothQuant, arXiv:2211.10438, and Lin et al., AWQ, arXiv:2306.00978.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

# Factors beyond have no use, and could bring float32 arithmetic near its ends.
LARGEST_FACTOR = 2.0**12


@dataclass(frozen=True)
class FoldedInput:
    """The input of one or more products, whose columns can be scaled.

    Attributes:
        divided: the tensor whose rows are divided by the factors: a norm, or the matrix that computes the
            input.
        readers: the matrices whose columns are multiplied by them.
        bias: the bias of ``divided``, which is divided as well where the model has it.
        heads: of keys and values, for the input of ``o_proj``; else 1.
        queries: heads that read the same value head, and so share its factors; else 1.
    """

    divided: str
    readers: tuple[str, ...]
    bias: str | None = None
    heads: int = 1
    queries: int = 1

    @property
    def of_values(self) -> bool:
        """Whether values are divided: then what is in the KV cache is, too."""
        return self.divided.endswith(".v_proj.weight")

    def of_columns(self, factors: torch.Tensor) -> torch.Tensor:
        """The factor of each of the readers' columns for factors of the divided rows."""
        if self.queries == 1:
            return factors
        return factors.view(self.heads, 1, -1).expand(-1, self.queries, -1).reshape(-1)

    def of_rows(self, sums: torch.Tensor) -> torch.Tensor:
        """Sums over the readers' columns for the divided rows: value heads have the mean of their queries."""
        if self.queries == 1:
            return sums
        return sums.view(self.heads, self.queries, -1).mean(1).flatten()


def folded_inputs(layer: int) -> tuple[FoldedInput, ...]:
    """The inputs of a layer that integer products fold, that of ``up_proj`` before that of ``down_proj``,
    which divides it again.

    ``o_proj``'s is not hard to round to 8 bits (docs/verification.md).
    """
    name = f"model.layers.{layer}"
    return (
        FoldedInput(
            f"{name}.input_layernorm.weight", tuple(f"{name}.self_attn.{part}_proj.weight" for part in "qkv")
        ),
        FoldedInput(
            f"{name}.post_attention_layernorm.weight",
            (f"{name}.mlp.gate_proj.weight", f"{name}.mlp.up_proj.weight"),
        ),
        FoldedInput(f"{name}.mlp.up_proj.weight", (f"{name}.mlp.down_proj.weight",)),
    )


def value_input(layer: int, query_heads: int, kv_heads: int) -> FoldedInput:
    """The input of ``o_proj``: attention takes means of values, so their scale passes through it."""
    name = f"model.layers.{layer}.self_attn"
    return FoldedInput(
        f"{name}.v_proj.weight",
        (f"{name}.o_proj.weight",),
        f"{name}.v_proj.bias",
        kv_heads,
        query_heads // kv_heads,
    )


def decoder_inputs(layer: int, query_heads: int, kv_heads: int) -> tuple[FoldedInput, ...]:
    """All inputs of a layer, first those that divide a matrix: what reads a norm is balanced as it will be
    rounded."""
    attention, mlp, gated = folded_inputs(layer)
    return gated, value_input(layer, query_heads, kv_heads), attention, mlp


@dataclass(frozen=True)
class Folding:
    """What is done to each tensor of the checkpoint. Factors are float32, one per row or column.

    Attributes:
        divided: by a tensor's name, the factors by which its rows are divided.
        multiplied: by a matrix's name, the factors with which its columns are multiplied.
    """

    divided: Mapping[str, torch.Tensor]
    multiplied: Mapping[str, torch.Tensor]

    @classmethod
    def of_inputs(cls, factors: Mapping[FoldedInput, torch.Tensor]) -> Folding:
        """The folding that scales the given inputs."""
        divided = {found.divided: factor for found, factor in factors.items()}
        divided |= {found.bias: factor for found, factor in factors.items() if found.bias is not None}
        return cls(
            divided,
            {
                reader: found.of_columns(factor)
                for found, factor in factors.items()
                for reader in found.readers
            },
        )

    def __contains__(self, name: str) -> bool:
        return name in self.divided or name in self.multiplied

    def apply(self, name: str, rows: torch.Tensor, start: int = 0) -> torch.Tensor:
        """Some rows of the checkpoint's tensor, from row ``start`` on, as the folded model has them."""
        if name in self.multiplied:
            rows = rows.float() * self.multiplied[name]
        if name in self.divided:
            rows = rows.float() / self._of_rows(name, rows, start)
        return rows

    def undo(self, name: str, rows: torch.Tensor, start: int = 0) -> torch.Tensor:
        """The checkpoint's rows for those of the folded model."""
        if name in self.divided:
            rows = rows * self._of_rows(name, rows, start)
        if name in self.multiplied:
            rows = rows / self.multiplied[name]
        return rows

    def of_cache(self, layer: int, part: str, like: torch.Tensor) -> torch.Tensor:
        """By what a layer's "key" or "value" is divided in the cache, ``[kv_heads, head_size]``."""
        import torch

        name = f"model.layers.{layer}.self_attn.v_proj.weight"
        if part == "value" and name in self.divided:
            return self.divided[name].view_as(like)
        return torch.ones_like(like)

    def __or__(self, other: Folding) -> Folding:
        """Both, where they fold other inputs."""
        return Folding({**self.divided, **other.divided}, {**self.multiplied, **other.multiplied})

    def _of_rows(self, name: str, rows: torch.Tensor, start: int) -> torch.Tensor:
        factors = self.divided[name][start : start + len(rows)]
        return factors if rows.dim() == 1 else factors.unsqueeze(-1)


NO_FOLDING = Folding({}, {})


class Weights(Protocol):
    """The checkpoint's tensors by name; see ``weights.CheckpointWeights``."""

    def __getitem__(self, name: str) -> torch.Tensor: ...

    def __contains__(self, name: str) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def release(self, name: str) -> None: ...


class FoldedWeights:
    """The tensors of the folded model, each computed when it is asked for."""

    def __init__(self, weights: Weights, folding: Folding) -> None:
        self._weights = weights
        self._folding = folding

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._folding.apply(name, self._weights[name])

    def __contains__(self, name: str) -> bool:
        return name in self._weights

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, without computing it."""
        return self._weights.shape(name)

    def release(self, name: str) -> None:
        """See ``weights.CheckpointWeights.release``."""
        self._weights.release(name)
