"""An 8-bit matrix stored as two of 4 bits: its upper halves alone give a coarse product from half the bytes.

A code c (zero at 128, at most 247) is kept as u = (c + 8) >> 4 and l = (c + 8) & 15, so that

    c - 128 = 16 (u - 8) + (l - 8)

and both halves are 4-bit numbers with zero at 8, as ``MatMulNBits`` and ``GatherBlockQuantized`` take
them; u is the nearest that 4 bits have. Both share the block's scale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

# Codes relative to their zero: beyond +119 the upper half would have no number to round to.
LOWEST, HIGHEST = -128, 119
_ROUNDING = 8


def split_codes(codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Upper and lower halves uint8 ``[.., n / 2]`` of codes uint8 ``[.., n]``; earlier ones in low bits."""
    raised = codes + _ROUNDING
    upper, lower = raised >> 4, raised & 15
    return tuple(half[..., 0::2] | (half[..., 1::2] << 4) for half in (upper, lower))  # type: ignore[return-value]


def join_codes(upper: torch.Tensor, lower: torch.Tensor | None) -> torch.Tensor:
    """The codes uint8 ``[.., n]`` again; without lower halves those of the coarse matrix."""
    codes = (_nibbles(upper) << 4) - _ROUNDING
    return codes + (_ROUNDING if lower is None else _nibbles(lower))


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


class Halves:
    """The halves of a finished export, mapped, read as the codes that they stand for.

    Args:
        upper: uint8 ``[N, B, block_size / 2]``.
        lower: uint8 ``[N, K / 2]``, or None for the coarse matrix.
    """

    def __init__(self, upper: NDArray[np.uint8], lower: NDArray[np.uint8] | None) -> None:
        self._upper, self._lower = upper, lower
        self.shape = (*upper.shape[:-1], 2 * upper.shape[-1])
        self.dtype = upper.dtype

    def __getitem__(self, rows: Any) -> NDArray[np.uint8]:
        import torch

        upper = torch.from_numpy(np.array(self._upper[rows]))
        lower = None
        if self._lower is not None:
            lower = torch.from_numpy(np.array(self._lower[rows])).view(upper.shape)
        codes: NDArray[np.uint8] = join_codes(upper, lower).numpy()
        return codes
