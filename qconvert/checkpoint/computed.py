"""Tensors that no file holds as floats: dequantised, or merged, whenever they are asked for, one at a time.

A format of weights other than plain floats is a class with these methods. transformers' model then has a
placeholder of the right shape in the tensor's place, whose values are NaN, so that whoever reads it past
``weights.CheckpointWeights`` is found out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from qconvert.formats.layout import PackedWeight
from qconvert.formats.recipe import Kept

if TYPE_CHECKING:
    import torch

_ATTRIBUTE = "_qconvert_computed"


class Computed(Protocol):
    """One tensor of the checkpoint, by its name there.

    Attributes:
        shape: of the floats, ``[N, K]`` or ``[N]``.
        stored_as: for people: "4 bits in groups of 128 (gptq)".
        stored_bytes: of everything in the files that belongs to it.
        kept: how its codes can be stored as they are; None where no graph has a place for them.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def stored_as(self) -> str: ...

    @property
    def stored_bytes(self) -> int: ...

    @property
    def kept(self) -> Kept | None: ...

    def rows(self, wanted: slice | torch.Tensor) -> torch.Tensor:
        """Some rows in float32; ``slice(None)`` is all of them.

        This is what an export is proven against: it shares no arithmetic with ``pack``.
        """
        ...

    def pack(self) -> PackedWeight:
        """The codes, scales and zero points in blocks; only where it can be ``kept``."""
        ...

    def order(self) -> torch.Tensor | None:
        """int32 ``[K]``: which input each column of ``pack`` reads, where ``kept`` has an order."""
        ...

    def release(self) -> None:
        """It has been used: mapped pages may leave memory."""
        ...


def placeholder(shape: tuple[int, ...]) -> torch.Tensor:
    """What stands in transformers' model in the place of a computed tensor; it takes no memory."""
    import torch

    return torch.full((1,), torch.nan, dtype=torch.bfloat16).expand(shape)


def attach(model: Any, computed: Mapping[str, Computed]) -> None:
    """Give a model its computed tensors."""
    setattr(model, _ATTRIBUTE, dict(computed))


def computed_of(model: Any) -> Mapping[str, Computed]:
    """A model's computed tensors, by their names in the checkpoint; most models have none."""
    found: Mapping[str, Computed] = getattr(model, _ATTRIBUTE, {})
    return found


class KeptWeights(Mapping[str, PackedWeight]):
    """Those matrices of a model whose codes a recipe keeps, packed when they are asked for.

    Args:
        model: the checkpoint.
        kept: as the recipe has it.
    """

    def __init__(self, model: Any, kept: Mapping[str, Kept]) -> None:
        computed = computed_of(model)
        self._found = {name: computed[name] for name in kept}

    def __getitem__(self, name: str) -> PackedWeight:
        return self._found[name].pack()

    def __contains__(self, name: object) -> bool:
        return name in self._found  # Mapping's own would pack it

    def __iter__(self) -> Any:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def order(self, name: str) -> torch.Tensor:
        """The order of a matrix's columns, int32 ``[K]``; only where its ``Kept`` has one."""
        order = self._found[name].order()
        assert order is not None, "the recipe says that it has an order"
        return order
