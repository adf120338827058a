"""A model's tensors with adapters in them, each computed when it is asked for; the files stay what they are.

W + sum over the adapters of weight · scaling · B A, in float32. Of an embedding it is the transposed product.

Source: peft 0.21 ``tuners/lora/layer.py``, ``get_delta_weight``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from qconvert.checkpoint.computed import Computed

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Product:
    """What one adapter adds: ``factor`` times ``left`` ``[N, r]`` times ``right`` ``[r, K]``."""

    left: torch.Tensor
    right: torch.Tensor
    factor: float

    def rows(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """Some rows of it, float32."""
        return (self.left[rows] @ self.right) * self.factor


class Base(Protocol):
    """A tensor before anything is added."""

    def rows(self, wanted: slice | torch.Tensor) -> torch.Tensor:
        """Some rows in float32."""
        ...

    def release(self) -> None:
        """Mapped pages may leave memory."""
        ...


class InFile:
    """A tensor of floats in a file, mapped when it is asked for; see ``Base``."""

    def __init__(self, files: Any, name: str) -> None:
        self._files, self._name = files, name

    @property
    def stored_bytes(self) -> int:
        """Of the file."""
        return int(self._files.bytes_of(self._name))

    def rows(self, wanted: slice | torch.Tensor) -> torch.Tensor:
        """Some rows in float32: a copy, so that nothing is added to the file's pages."""
        found: torch.Tensor = self._files.read(self._name)[wanted]
        return found.float()

    def release(self) -> None:
        """Mapped pages may leave memory."""
        self._files.release(self._name)


class Merged:
    """A ``computed.Computed`` tensor: a base, and what adapters add to it.

    Args:
        shape: of the tensor.
        base: the checkpoint's own, or what an adapter has in its place.
        products: of the adapters.
        quantised: the checkpoint's tensor where that is in codes; it cannot be kept.
    """

    kept = None

    def __init__(
        self, shape: tuple[int, ...], base: Base, products: tuple[Product, ...], quantised: Computed | None
    ) -> None:
        self.shape = shape
        self.quantised = quantised
        self._base, self._products = base, products

    @property
    def stored_as(self) -> str:
        """For people."""
        return "with adapters" if self.quantised is None else f"{self.quantised.stored_as} with adapters"

    @property
    def stored_bytes(self) -> int:
        """Of the checkpoint's own tensor."""
        base: Any = self._base if self.quantised is None else self.quantised
        return int(base.stored_bytes)

    def rows(self, wanted: slice | torch.Tensor) -> torch.Tensor:
        """Some rows in float32."""
        found = self._base.rows(wanted)
        for product in self._products:
            found = found + product.rows(wanted)
        return found

    def pack(self) -> Any:
        """Never asked for: what was added is in no code."""
        raise AssertionError("merged weights are not kept")

    def order(self) -> None:
        """None."""

    def release(self) -> None:
        """See ``computed.Computed``."""
        self._base.release()
