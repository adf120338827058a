"""What a walk (``walk.py``) and those who round its layers say to one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from qconvert.formats.folding import FoldedInput
from qconvert.formats.layout import PackedWeight

Factors = dict[FoldedInput, torch.Tensor]
Rounded = tuple[Factors, dict[str, PackedWeight]]


class Seen(Protocol):
    """What the inputs of a product are like; see ``statistics.InputStatistics``."""

    @property
    def products(self) -> Sequence[torch.Tensor]:
        """Mean of x x^T inside each group, ``[groups, group, group]``, and in the rest, if there is one."""
        ...

    @property
    def squares(self) -> torch.Tensor:
        """Mean of x^2, ``[K]``."""
        ...

    @property
    def sample(self) -> torch.Tensor:
        """Some of the inputs, ``[n, K]``."""
        ...


class Work(Protocol):
    """One layer to be rounded."""

    @property
    def weights(self) -> Mapping[str, torch.Tensor]:
        """Those of the checkpoint that are rounded, by their names."""
        ...

    def done(self) -> Rounded:
        """The factors of the layer's inputs and its rounded weights.

        Raises:
            NonFiniteWeightError: NaN or Inf in a weight.
        """
        ...


class Plan(Protocol):
    """How a recipe rounds the layers of a walk.

    Attributes:
        rounds_long: whether rounding a layer takes about as long as reading it does, so that who rounds is
            to have a core of its own.
    """

    rounds_long: bool

    def group(self, name: str, columns: int) -> int:
        """Columns of a matrix's input whose products with one another are wanted."""
        ...

    def work(self, seen: Mapping[FoldedInput, Seen], weights: Mapping[str, torch.Tensor]) -> Work:
        """A layer, of whose inputs this was seen, in the order of ``decoder_inputs``."""
        ...
