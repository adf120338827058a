"""A matrix whose inputs are in groups that share a scale, and what its codes become in blocks."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qconvert.checkpoint.quantised.tensors import TensorFiles
from qconvert.formats.blocks import assemble
from qconvert.formats.layout import NonFiniteWeightError, PackedWeight, is_finite
from qconvert.formats.recipe import BLOCK_SIZES, BlockFormat, Kept
from qconvert.formats.stored import ORDER_PREFIX

if TYPE_CHECKING:
    import torch

# A scale for a whole row is repeated for blocks of this many: activations are rounded block by block, too.
_LONGEST_BLOCK = 128
_PADDED_BLOCK = 32
# Dequantised values that are computed at a time: 16 MiB in float32.
_PIECE = 1 << 22
SCALE_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}


@dataclass(frozen=True)
class Groups:
    """How a matrix is cut: ``length`` weights along K have one scale and one zero point.

    ``of_inputs`` is the group of every input, int64 ``[K]``, where it is not the input's place / length.
    """

    bits: int
    length: int
    symmetric: bool
    scale_dtype: str
    of_inputs: torch.Tensor | None = None

    def order(self) -> torch.Tensor | None:
        """Inputs by their groups, int32 ``[K]``; None where they come in this order."""
        import torch

        return None if self.of_inputs is None else torch.argsort(self.of_inputs, stable=True).int()

    def even(self, columns: int) -> bool:
        """Whether every group but the last has as many inputs as it should."""
        import torch

        if self.of_inputs is None:
            return True
        due = torch.arange(columns) // self.length
        return torch.equal(self.of_inputs.sort().values, due)


def block_size(length: int, columns: int) -> int | None:
    """The longest blocks that lie in one group each; None where there are none."""
    if length >= columns:
        fitting = [size for size in BLOCK_SIZES if size <= _LONGEST_BLOCK and columns % size == 0]
        return fitting[-1] if fitting else _PADDED_BLOCK
    if length in BLOCK_SIZES:
        return length
    fitting = [size for size in BLOCK_SIZES if size <= _LONGEST_BLOCK and length % size == 0]
    return fitting[-1] if fitting else None


class Grouped(ABC):
    """A ``computed.Computed`` matrix ``[N, K]``; the formats say how codes and scales lie in their tensors.

    Args:
        shape: of the floats.
        groups: how it is cut.
        files: where its tensors are.
        parts: their names.
        method: for people.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        groups: Groups,
        files: TensorFiles,
        parts: tuple[str, ...],
        method: str,
    ) -> None:
        self.shape: tuple[int, ...] = shape
        self.groups = groups
        self._files, self._parts, self._method = files, parts, method
        self.kept = self._keep()

    @property
    def stored_as(self) -> str:
        """For people."""
        length = self.groups.length
        whole = "rows" if length >= self.shape[1] else f"groups of {length}"
        return f"{self.groups.bits} bits in {whole} ({self._method})"

    @property
    def stored_bytes(self) -> int:
        """Of all its tensors."""
        return self._files.bytes_of(*self._parts)

    def rows(self, wanted: slice | torch.Tensor) -> torch.Tensor:
        """Some rows in float32."""
        import torch

        picked = torch.arange(self.shape[0])[wanted]
        found = torch.empty(len(picked), self.shape[1])
        step = max(1, _PIECE // self.shape[1])
        for start in range(0, len(picked), step):
            found[start : start + step] = self._dequantise(picked[start : start + step])
        return found

    def pack(self) -> PackedWeight:
        """The codes in blocks, in the order of ``order``.

        Raises:
            NonFiniteWeightError: a scale is NaN or Inf.
        """
        import torch

        assert self.kept is not None, "no block can hold these codes"
        codes, scales, zeros = self._codes()
        if not is_finite(scales):
            raise NonFiniteWeightError
        order = self.order()
        if order is not None:
            codes = codes[:, order]
        fmt, columns = self.kept.fmt, self.shape[1]
        starts = torch.arange(0, columns, fmt.block_size)
        of_blocks = starts // min(self.groups.length, columns)
        symmetric = fmt.symmetric or zeros is None
        return assemble(
            codes, scales[:, of_blocks], None if symmetric or zeros is None else zeros[:, of_blocks], fmt
        )

    def order(self) -> torch.Tensor | None:
        """See ``computed.Computed``."""
        return self.groups.order()

    def release(self) -> None:
        """See ``computed.Computed``."""
        self._files.release(*self._parts)

    @abstractmethod
    def _dequantise(self, rows: torch.Tensor) -> torch.Tensor:
        """Some rows, by their numbers, in float32 ``[n, K]``."""

    @abstractmethod
    def _codes(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Codes uint8 ``[N, K]``, scales float32 ``[N, groups]``, zero points ``[N, groups]``.

        No zero points where they all are the middle.
        """

    def _keep(self) -> Kept | None:
        groups, columns = self.groups, self.shape[1]
        size = block_size(groups.length, columns)
        if size is None or not groups.even(columns):
            return None
        fmt = BlockFormat(groups.bits, size, groups.symmetric, groups.scale_dtype)
        order = groups.order()
        if order is None:
            return Kept(fmt)
        digest = hashlib.sha256(order.numpy().tobytes()).hexdigest()[:12]
        return Kept(fmt, f"{ORDER_PREFIX}{digest}")
