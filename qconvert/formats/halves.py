"""An 8-bit matrix stored as two of 4 bits: its upper halves alone give a coarse product from half the bytes.

A code c (zero at 128, at most 247) is kept as u = (c + 8) >> 4 and l = (c + 8) & 15, so that

    c - 128 = 16 (u - 8) + (l - 8)

and both halves are 4-bit numbers with zero at 8, as ``MatMulNBits`` and ``GatherBlockQuantized`` take
them. 16 (u - 8) is the multiple of 16 nearest to c - 128. Both halves share the block's scale.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qconvert.formats.blocks import SCALES, Blocks, StoredBlocks
from qconvert.formats.layout import Arrays, PackedWeight, Part, as_tensor, nibbles, row_ranges
from qconvert.formats.recipe import BlockFormat

if TYPE_CHECKING:
    import torch

_UPPER, _LOWER = ".upper", ".lower"
_ROUNDING = 8


def split_codes(codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Upper and lower halves, uint8 ``[.., n / 2]``, of codes ``[.., n]``; the earlier code in low bits."""
    raised = codes + _ROUNDING
    upper, lower = raised >> 4, raised & 15
    return tuple(half[..., 0::2] | (half[..., 1::2] << 4) for half in (upper, lower))  # type: ignore[return-value]


def join_codes(upper: torch.Tensor, lower: torch.Tensor | None) -> torch.Tensor:
    """The codes uint8 ``[.., n]``; without lower halves, the codes of the coarse matrix."""
    codes = (nibbles(upper) << 4) - _ROUNDING
    return codes + (_ROUNDING if lower is None else nibbles(lower))


class Halves(Blocks):
    """The layout of a matrix whose upper halves can be multiplied on their own; see ``layout.Layout``."""

    def parts(self, rows: int, columns: int) -> tuple[Part, ...]:
        """The upper halves as blocks, the lower ones as rows, and the scales of both."""
        size = self.fmt.block_size
        blocks = -(-columns // size)
        return (
            Part("data", _UPPER, "uint8", (rows, blocks, size // 2)),
            Part("lower", _LOWER, "uint8", (rows, blocks * size // 2)),
            Part("scales", SCALES, self.fmt.scale_dtype, (rows, blocks)),
        )

    def pieces(self, packed: Sequence[PackedWeight]) -> Iterator[Iterable[torch.Tensor]]:
        """See ``layout.Layout``; the halves are split piece by piece."""
        (matrix,) = packed
        for half in (0, 1):
            yield (split_codes(matrix.data[piece])[half] for piece in row_ranges(matrix.data))
        yield [matrix.scales]


class StoredHalves(StoredBlocks):
    """Halves of a finished graph, mapped; see ``layout.Stored``."""

    def __init__(
        self, upper: NDArray[np.uint8], lower: NDArray[np.uint8], scales: NDArray[Any], fmt: BlockFormat
    ) -> None:
        super().__init__(_Joined(upper, lower), scales, None, fmt, upper.shape[1] * fmt.block_size)
        self._coarse = _Joined(upper, None)

    def coarse_rows(self, wanted: slice) -> torch.Tensor:
        """Like ``rows``, from the upper halves alone."""
        return self._unpack(self._coarse, wanted)


def find_halves(arrays: Arrays, name: str, columns: int) -> StoredHalves | None:
    """A matrix of a finished graph in this layout, or None; see ``stored.LAYOUTS``."""
    if name + _LOWER not in arrays:
        return None
    scales = arrays[name + SCALES]
    upper = arrays.matrix(name + _UPPER, scales.shape)
    fmt = BlockFormat(8, 2 * upper.shape[-1], True, scales.dtype.name, halves=True)
    return StoredHalves(upper, arrays[name + _LOWER], scales, fmt)


class _Joined:
    """Mapped halves that read as the codes for which they stand, uint8 ``[N, B, block_size]``.

    Args:
        upper: uint8 ``[N, B, block_size / 2]``.
        lower: uint8 ``[N, K / 2]``, or None for the coarse matrix.
    """

    def __init__(self, upper: NDArray[np.uint8], lower: NDArray[np.uint8] | None) -> None:
        self._upper, self._lower = upper, lower
        self.shape = (*upper.shape[:-1], 2 * upper.shape[-1])

    def __getitem__(self, rows: Any) -> NDArray[np.uint8]:
        upper = as_tensor(self._upper[rows])
        lower = None if self._lower is None else as_tensor(self._lower[rows]).view(upper.shape)
        codes: NDArray[np.uint8] = join_codes(upper, lower).numpy()
        return codes
