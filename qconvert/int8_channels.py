"""8-bit weights with one scale per output channel, as ONNX Runtime's integer product takes them.

``MatMulIntegerToFloat`` multiplies uint8 activations with int8 weights ``[K, N]``; on processors with
VNNI that is two to three times as fast as any kernel with blocks (docs/life-of-a-token.md).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qconvert.quantize import NonFiniteWeightError, row_ranges

if TYPE_CHECKING:
    import torch

LARGEST = 127  # -128 is left out: both signs reach equally far


def pack_int8_channels(
    weight: torch.Tensor, workers: Executor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a checkpoint's matrix ``[N, K]`` to nearest, and turn it round to ``[K, N]``.

    Returns:
        int8 ``[K, N]``, and float32 scales ``[N]``: max|w| / 127 of each output channel.

    Raises:
        NonFiniteWeightError: NaN or Inf in the weight.
    """
    import torch

    rows, columns = weight.shape
    data = torch.empty((columns, rows), dtype=torch.int8)
    scales = torch.empty(rows, dtype=torch.float32)

    def pack_rows(part: slice) -> None:
        values = weight[part].to(torch.float32)
        steps = values.abs().amax(-1) / LARGEST
        if not bool(torch.isfinite(steps).all()):
            raise NonFiniteWeightError
        steps.masked_fill_(steps == 0, 1.0)  # a channel of zeros: any scale stores it exactly
        codes = (values / steps.unsqueeze(-1)).round_().clamp_(-LARGEST, LARGEST)
        data[:, part] = codes.to(torch.int8).t()
        scales[part] = steps

    for _ in (map if workers is None else workers.map)(pack_rows, row_ranges(weight)):
        pass  # waits for each piece, and raises what it raised
    return data, scales


def channel_groups(channels: int, groups: int) -> list[slice]:
    """Cut channels into groups of about equal size, all but the last a multiple of 16 (a kernel's tile)."""
    width = max(16, -(-channels // groups) // 16 * 16)
    cuts = [min(width * group, channels) for group in range(groups)] + [channels]
    return [slice(start, stop) for start, stop in itertools.pairwise(cuts) if stop > start]


def unpack_int8_channels(data: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The float32 weight ``[N, K]`` that packed channels stand for."""
    return (data.float() * scales).t()


class Int8Channels:
    """A packed matrix of a finished export, in its groups: ``shape`` is the checkpoint's ``[N, K]``.

    Args:
        matrices: int8 ``[K, N]`` cut along one axis, mapped.
        scales: float32, one array for each matrix cut along N, or one ``[N]`` for all that are cut along K.
    """

    def __init__(self, matrices: Sequence[NDArray[np.int8]], scales: Sequence[NDArray[np.float32]]) -> None:
        self.data = matrices[0]
        self._matrices = matrices
        self._scales = scales
        self._by_output = len(scales) == len(matrices)
        inputs, outputs = matrices[0].shape
        if self._by_output:
            self.shape = (sum(matrix.shape[1] for matrix in matrices), inputs)
        else:
            self.shape = (outputs, sum(matrix.shape[0] for matrix in matrices))

    @property
    def scales(self) -> torch.Tensor:
        """The scales ``[N]`` of all output channels."""
        import torch

        return torch.from_numpy(np.concatenate(self._scales))

    def rows(self, wanted: slice) -> torch.Tensor:
        """Some rows of the checkpoint's matrix, as float32 ``[rows, K]``."""
        import torch

        if not self._by_output:
            data = np.concatenate([matrix[:, wanted] for matrix in self._matrices])
            return unpack_int8_channels(
                torch.from_numpy(data), torch.from_numpy(self._scales[0][wanted].copy())
            )
        parts, first = [], 0
        for matrix, scales in zip(self._matrices, self._scales):
            part = slice(max(0, wanted.start - first), max(0, wanted.stop - first))
            parts.append(
                unpack_int8_channels(
                    torch.from_numpy(np.array(matrix[:, part])), torch.from_numpy(np.array(scales[part]))
                )
            )
            first += len(scales)
        return torch.cat(parts)
