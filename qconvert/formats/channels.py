"""8-bit weights with one scale per output channel, as ONNX Runtime's integer product takes them.

``MatMulIntegerToFloat`` multiplies uint8 activations with int8 weights ``[K, N]``; on processors with
VNNI that is two to three times as fast as any kernel with blocks (docs/life-of-a-token.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qconvert.formats.blocks import NonFiniteWeightError, row_ranges
from qconvert.formats.recipe import ChannelFormat

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
    """Cut channels into groups of one size, a multiple of 16 (a kernel's tile); the last may be smaller."""
    width = -(-channels // (groups * 16)) * 16
    return [slice(start, min(start + width, channels)) for start in range(0, channels, width)]


def groups_in_a_part(channels: int, fmt: ChannelFormat) -> int:
    """Into how many groups each of the MLP's parts is cut: one, where they would not be of one size."""
    groups = max(1, fmt.mlp_groups // fmt.mlp_parts)
    return groups if channels % (fmt.mlp_parts * groups * 16) == 0 else 1


def unpack_int8_channels(data: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The float32 weight ``[N, K]`` that packed channels stand for."""
    return (data.float() * scales).t()


class Int8Channels:
    """A packed matrix of a finished export, in its groups: ``shape`` is the checkpoint's ``[N, K]``.

    Args:
        matrices: int8 ``[K, N]`` cut along one axis, mapped.
        scales: float32, one array for each matrix.
        by_input: they are cut along K, not along N.

    Attributes:
        inputs: how many input channels share a scale; the last of several groups may have fewer.
    """

    def __init__(
        self, matrices: Sequence[NDArray[np.int8]], scales: Sequence[NDArray[np.float32]], *, by_input: bool
    ) -> None:
        self.data = matrices[0]
        self._matrices = matrices
        self._scales = scales
        self._by_input = by_input
        self.inputs, outputs = matrices[0].shape
        if by_input:
            self.shape = (outputs, sum(matrix.shape[0] for matrix in matrices))
        else:
            self.shape = (sum(matrix.shape[1] for matrix in matrices), self.inputs)

    @property
    def scales(self) -> torch.Tensor:
        """The scales ``[N]`` of all output channels, of a matrix that is not cut along its inputs."""
        import torch

        assert not self._by_input, "each group of inputs has its own"
        return torch.from_numpy(np.concatenate(self._scales))

    def rows(self, wanted: slice) -> torch.Tensor:
        """Some rows of the checkpoint's matrix, as float32 ``[rows, K]``."""
        import torch

        if self._by_input:
            groups = zip(self._matrices, self._scales)
            cuts = [(np.array(matrix[:, wanted]), np.array(scales[wanted])) for matrix, scales in groups]
            return torch.cat([unpack_int8_channels(*map(torch.from_numpy, cut)) for cut in cuts], 1)
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
