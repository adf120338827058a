"""Factors moved from a product's inputs into its weights, so that both round well to 8 bits.

x W^T = (x / f) (W f)^T. Dividing costs nothing where the input comes from a norm or from another
matrix: ``input_layernorm`` and ``post_attention_layernorm`` are divided, and of ``down_proj``'s input
the rows of ``up_proj``. The model computes the same numbers, up to rounding.

Source: Xiao et al., SmoothQuant, arXiv:2211.10438, which folds into norms only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class FoldedInput:
    """One input whose columns can be scaled: what is divided, and the matrices that read it."""

    divided: str
    readers: tuple[str, ...]


def folded_inputs(layer: int) -> tuple[FoldedInput, ...]:
    """The inputs of a layer, that of ``up_proj`` before that of ``down_proj``, which divides it again.

    ``o_proj`` has none: its input is not hard to round (docs/verification.md).
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
        """The folding that scales each of some inputs."""
        return cls(
            {found.divided: factor for found, factor in factors.items()},
            {reader: factor for found, factor in factors.items() for reader in found.readers},
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

    def _of_rows(self, name: str, rows: torch.Tensor, start: int) -> torch.Tensor:
        factors = self.divided[name][start : start + len(rows)]
        return factors if rows.dim() == 1 else factors.unsqueeze(-1)


NO_FOLDING = Folding({}, {})


class Weights(Protocol):
    """The checkpoint's tensors by name; see ``weights.CheckpointWeights``."""

    def __getitem__(self, name: str) -> torch.Tensor: ...

    def __contains__(self, name: str) -> bool: ...

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

    def release(self, name: str) -> None:
        """See ``weights.CheckpointWeights.release``."""
        self._weights.release(name)
