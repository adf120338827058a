"""8-bit weights with one scale per output channel, as ONNX Runtime's integer product takes them.

``MatMulIntegerToFloat`` multiplies uint8 activations with int8 weights ``[K, N]``; on processors with
VNNI that is two to three times as fast as any kernel with blocks (docs/life-of-a-token.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qconvert.formats.layout import (
    Arrays,
    NonFiniteWeightError,
    PackedWeight,
    Part,
    as_tensor,
    for_each,
    is_finite,
    row_ranges,
)
from qconvert.formats.recipe import BlockFormat, ChannelFormat

if TYPE_CHECKING:
    import torch

_DATA, _SCALES = ".int8", ".int8_scales"
_INPUTS_DATA, _INPUTS_SCALES = ".int8_inputs", ".int8_inputs_scales"
_SPLIT = (".gate_proj.weight", ".up_proj.weight")
LARGEST = 127  # -128 is not used, so that both signs have the same range


def pack_int8_channels(
    weight: torch.Tensor, workers: Executor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a checkpoint's matrix ``[N, K]`` to nearest, and transpose it to ``[K, N]``.

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
        if not is_finite(steps):
            raise NonFiniteWeightError
        steps.masked_fill_(steps == 0, 1.0)  # a channel of zeros: any scale but 0 stores it exactly
        codes = (values / steps.unsqueeze(-1)).round_().clamp_(-LARGEST, LARGEST)
        data[:, part] = codes.to(torch.int8).t()
        scales[part] = steps

    for_each(row_ranges(weight), pack_rows, workers)
    return data, scales


def channel_groups(channels: int, groups: int) -> list[slice]:
    """Cut channels into groups of one size, a multiple of 16 (a kernel's tile); the last may be smaller."""
    width = -(-channels // (groups * 16)) * 16
    return [slice(start, min(start + width, channels)) for start in range(0, channels, width)]


def groups_in_a_part(channels: int, fmt: ChannelFormat) -> int:
    """Into how many groups each of the MLP's parts is cut; 1 where the groups would differ in size."""
    groups = max(1, fmt.mlp_groups // fmt.mlp_parts)
    return groups if channels % (fmt.mlp_parts * groups * 16) == 0 else 1


def channel_layout(name: str, channels: int, fmt: ChannelFormat) -> Channels | InputChannels:
    """How a linear weight of the decoder is stored, by its name; ``channels``: of the MLP between."""
    parts = len(channel_groups(channels, fmt.mlp_parts))
    if name.endswith(".down_proj.weight") and parts > 1:
        return InputChannels(parts * groups_in_a_part(channels, fmt))
    return Channels(fmt.mlp_parts if name.endswith(_SPLIT) else 1)


def unpack_int8_channels(data: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The float32 weight ``[N, K]`` that packed channels stand for."""
    return (data.float() * scales).t()


@dataclass(frozen=True)
class Channels:
    """The layout of matrices for integer products, in ``cuts`` of their output channels.

    See ``layout.Layout``.
    """

    cuts: int = 1

    def pack(self, weight: torch.Tensor, workers: Executor | None) -> PackedWeight:
        """One matrix, rounded to nearest."""
        return PackedWeight(*pack_int8_channels(weight, workers))

    def parts(self, rows: int, columns: int) -> tuple[Part, ...]:
        """Data and scales of each cut."""
        found: list[Part] = []
        for cut, channels in enumerate(channel_groups(rows, self.cuts)):
            number, width = f".{cut}" if self.cuts > 1 else "", channels.stop - channels.start
            found.append(Part("data", _DATA + number, "int8", (columns, width)))
            found.append(Part("scales", _SCALES + number, "float32", (width,)))
        return tuple(found)

    def pieces(self, packed: Sequence[PackedWeight]) -> Iterator[Iterable[torch.Tensor]]:
        """See ``layout.Layout``."""
        import torch

        data, scales = (
            torch.cat([each.data for each in packed], 1),
            torch.cat([each.scales for each in packed]),
        )
        for channels in channel_groups(len(scales), self.cuts):
            yield [data[:, channels]]
            yield [scales[channels]]


@dataclass(frozen=True)
class InputChannels:
    """The same for one matrix in ``cuts`` of its input channels, each with scales of its own."""

    cuts: int

    def pack(self, weight: torch.Tensor, workers: Executor | None) -> PackedWeight:
        """One matrix, rounded to nearest: data int8 ``[K, N]`` and scales ``[cuts, N]``."""
        import torch

        rows, columns = weight.shape
        cuts = channel_groups(columns, self.cuts)
        data, scales = torch.empty((columns, rows), dtype=torch.int8), torch.empty(len(cuts), rows)
        for cut, inputs in enumerate(cuts):
            data[inputs], scales[cut] = pack_int8_channels(weight[:, inputs], workers)
        return PackedWeight(data, scales)

    def parts(self, rows: int, columns: int) -> tuple[Part, ...]:
        """Data and scales of each cut."""
        found: list[Part] = []
        for cut, inputs in enumerate(channel_groups(columns, self.cuts)):
            found.append(Part("data", f"{_INPUTS_DATA}.{cut}", "int8", (inputs.stop - inputs.start, rows)))
            found.append(Part("scales", f"{_INPUTS_SCALES}.{cut}", "float32", (rows,)))
        return tuple(found)

    def pieces(self, packed: Sequence[PackedWeight]) -> Iterator[Iterable[torch.Tensor]]:
        """See ``layout.Layout``."""
        (matrix,) = packed
        for cut, inputs in enumerate(channel_groups(len(matrix.data), self.cuts)):
            yield [matrix.data[inputs]]
            yield [matrix.scales[cut]]


class _StoredCuts:
    """A matrix of a finished graph in several cuts, mapped; see ``layout.Stored``.

    Args:
        matrices: int8 ``[K, N]``, cut along one axis.
        scales: float32, one array for each matrix.
        shape: the checkpoint's ``[N, K]``.
    """

    dtype = "int8"
    scale_rounding = 0.0

    def __init__(
        self,
        matrices: Sequence[NDArray[np.int8]],
        scales: Sequence[NDArray[np.float32]],
        shape: tuple[int, int],
    ) -> None:
        self._matrices, self._scales = matrices, scales
        self.shape = shape
        # The last cut of the inputs may be smaller: the first one has the size of a block.
        self.rounding = BlockFormat(8, matrices[0].shape[0], symmetric=True)


class StoredChannels(_StoredCuts):
    """A matrix that is cut along its output channels, or whole."""

    def __init__(self, matrices: Sequence[NDArray[np.int8]], scales: Sequence[NDArray[np.float32]]) -> None:
        outputs = sum(matrix.shape[1] for matrix in matrices)
        super().__init__(matrices, scales, (outputs, matrices[0].shape[0]))

    @property
    def scales(self) -> torch.Tensor:
        """The scales ``[N]`` of all output channels."""
        return as_tensor(np.concatenate(self._scales))

    def rows(self, wanted: slice | NDArray[np.int64]) -> torch.Tensor:
        """Some rows of the checkpoint's matrix in float32 ``[rows, K]``."""
        import torch

        assert isinstance(wanted, slice), "only an embedding is looked up, which is never stored so"
        parts, first = [], 0
        for matrix, scales in zip(self._matrices, self._scales):
            part = slice(max(0, wanted.start - first), max(0, wanted.stop - first))
            parts.append(unpack_int8_channels(as_tensor(matrix[:, part]), as_tensor(scales[part])))
            first += len(scales)
        return torch.cat(parts)


class StoredInputChannels(_StoredCuts):
    """A matrix that is cut along its input channels."""

    def __init__(self, matrices: Sequence[NDArray[np.int8]], scales: Sequence[NDArray[np.float32]]) -> None:
        inputs = sum(matrix.shape[0] for matrix in matrices)
        super().__init__(matrices, scales, (matrices[0].shape[1], inputs))

    def rows(self, wanted: slice | NDArray[np.int64]) -> torch.Tensor:
        """Some rows of the checkpoint's matrix in float32 ``[rows, K]``."""
        import torch

        cuts = zip(self._matrices, self._scales)
        parts = [(as_tensor(data[:, wanted]), as_tensor(scales[wanted])) for data, scales in cuts]
        return torch.cat([unpack_int8_channels(*part) for part in parts], 1)


def find_channels(arrays: Arrays, name: str, columns: int) -> StoredChannels | None:
    """A matrix of a finished graph in ``Channels``, or None; see ``stored.LAYOUTS``."""
    matrices = arrays.numbered(name + _DATA)
    return StoredChannels(matrices, arrays.numbered(name + _SCALES)) if matrices else None


def find_input_channels(arrays: Arrays, name: str, columns: int) -> StoredInputChannels | None:
    """A matrix of a finished graph in ``InputChannels``, or None; see ``stored.LAYOUTS``."""
    matrices = arrays.numbered(name + _INPUTS_DATA)
    return StoredInputChannels(matrices, arrays.numbered(name + _INPUTS_SCALES)) if matrices else None
