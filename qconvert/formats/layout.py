"""What a layout is: one way to write a checkpoint's matrix into a graph's initializers, and to find it again.

Each layout is a file of this folder and a row of the table in ``stored.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qconvert.errors import QconvertError

if TYPE_CHECKING:
    import torch

# Elements that are packed at a time: few enough for float32 temporaries to stay in the processor's cache.
PIECE = 1 << 19


@dataclass(frozen=True)
class PackedWeight:
    """One packed matrix ``[N, K]``. The shapes are its layout's; those of blocks, with B = K / block_size
    rounded up, are:

    data: uint8 ``[N, B, block_size * bits / 8]``; scales: ``[N, B]`` in the format's type;
    zero_points: uint8 ``[N, ceil(B * bits / 8)]``, or None for a symmetric format;
    residuals: float32 ``[N, B]``, what is added to each weight of a block, or None where it is nothing.
    """

    data: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None = None
    residuals: torch.Tensor | None = None


class NonFiniteWeightError(ValueError):
    """A weight holds NaN or Inf, or values beyond what its scales can hold; the caller knows its name."""


@dataclass(frozen=True)
class Part:
    """One initializer of a stored matrix, without its content.

    Attributes:
        role: which input of an operator it is: "data", "scales", or another one of the layout's. A matrix
            that is cut has several parts of each role.
        suffix: follows the matrix's name.
        dtype: of its elements: a name of PyTorch's types, or "int4" for two signed numbers to a byte.
        shape: in elements.
    """

    role: str
    suffix: str
    dtype: str
    shape: tuple[int, ...]


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor Inf."""
    import torch

    if not tensor.numel():
        return True
    # Both ends are NaN if any value is. That takes a twelfth of the time of asking each value.
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor))


class Layout(Protocol):
    """How to write a matrix. Layouts are values: two that are equal write the same."""

    def pack(self, weight: torch.Tensor, workers: Executor | None) -> PackedWeight:
        """One matrix of the checkpoint ``[N, K]``.

        Raises:
            NonFiniteWeightError: it holds NaN or Inf.
        """
        ...

    def parts(self, rows: int, columns: int) -> tuple[Part, ...]:
        """The initializers of matrices that stand side by side along N and have ``rows`` rows in all.

        They are written in this order, and a forecast takes their sizes from here.
        """
        ...

    def pieces(self, packed: Sequence[PackedWeight]) -> Iterator[Iterable[torch.Tensor]]:
        """The content of each of these initializers, cut along its first axis."""
        ...


class Rounding(Protocol):
    """How coarse stored values are: blocks of ``block_size`` weights along K share a step of ``bits``."""

    @property
    def bits(self) -> int: ...

    @property
    def block_size(self) -> int: ...

    def step(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        """The step that blocks with values between ``low`` and ``high`` should have."""
        ...


class Stored(Protocol):
    """A tensor of a finished graph, mapped: one of the checkpoint's, or several side by side.

    Attributes:
        shape: as the checkpoint has it, ``[N, K]`` or ``[N]``.
        dtype: the element type of its data.
        rounding: None where values are only cast.
        scale_rounding: the largest relative error of its scales by rounding to their own type.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str: ...

    @property
    def rounding(self) -> Rounding | None: ...

    @property
    def scale_rounding(self) -> float: ...

    def rows(self, wanted: slice | NDArray[np.int64]) -> torch.Tensor:
        """Some rows, dequantised to float32. A slice must have a start and a stop."""
        ...


class Arrays:
    """The initializers of a finished graph by name, mapped.

    Args:
        graph: an .onnx file beside its data file.
    """

    def __init__(self, graph: Path) -> None:
        from qconvert.formats.graph_file import load_graph

        self._path = graph
        self._graph = load_graph(graph)
        self._tensors = {name: value.const_value for name, value in self._graph.graph.initializers.items()}
        self._orders = _orders_of_inputs(self._graph.graph)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> NDArray[Any]:
        """An initializer as it is stored.

        Raises:
            QconvertError: there is none of that name.
        """
        array: NDArray[Any] = self.tensor(name).numpy()
        return array

    def get(self, name: str) -> NDArray[Any] | None:
        """The same, or None."""
        tensor = self._tensors.get(name)
        return None if tensor is None else tensor.numpy()

    def tensor(self, name: str) -> Any:
        """The same as onnx_ir's tensor, which knows file and offset.

        Raises:
            QconvertError: there is none of that name.
        """
        if (tensor := self._tensors.get(name)) is None:
            raise QconvertError(
                f"the graph has no tensor {name}", where=self._path, hint="export the model again"
            )
        return tensor

    def order(self, name: str) -> NDArray[np.int64] | None:
        """Which input each column of a matrix in blocks reads, by its codes' name; None: as they come."""
        return self._orders.get(name)

    def has_matrix(self, name: str) -> bool:
        """Whether the graph holds a matrix in blocks, or only the view of its rows that look-ups read."""
        return name in self or rows_name(name) in self

    def matrix(self, name: str, blocks: Sequence[int]) -> NDArray[Any]:
        """Such a matrix ``[N, B, bytes of a block]``, with ``blocks`` its ``[N, B]``."""
        return self[name] if name in self else self[rows_name(name)].reshape(*blocks, -1)

    def numbered(self, name: str) -> list[NDArray[Any]]:
        """An initializer that stands in one piece, or its numbered parts; none if there is neither."""
        if name in self:
            return [self[name]]
        names = (f"{name}.{part}" for part in count())
        return [self[part] for part in takewhile(self.__contains__, names)]


def _orders_of_inputs(graph: Any) -> dict[str, NDArray[np.int64]]:
    """Found where it takes effect: in the ``Gather`` that stands in front of a product in blocks."""
    found = {}
    for node in graph:
        if node.op_type != "MatMulNBits" or (gather := node.inputs[0].producer()) is None:
            continue
        if gather.op_type == "Gather" and gather.attributes.get_int("axis", 0) == -1:
            found[str(node.inputs[1].name)] = gather.inputs[1].const_value.numpy().astype(np.int64)
    return found


def rows_name(name: str) -> str:
    """The view of a matrix in blocks as plain rows, from which an embedding is looked up."""
    return f"{name}.rows"


def part_name(name: str, first_row: int) -> str:
    """The view of some rows of a matrix, for a product that is computed in parts."""
    return f"{name}.from_{first_row}"


def row_ranges(weight: torch.Tensor) -> Iterator[slice]:
    """Cut a tensor along its first axis into ranges of about ``PIECE`` elements."""
    rows = max(1, PIECE // weight[0].numel())
    for start in range(0, weight.shape[0], rows):
        yield slice(start, min(start + rows, weight.shape[0]))


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    """The 4-bit numbers, uint8 ``[.., 2 n]``, that uint8 ``[.., n]`` holds; the earlier one in low bits."""
    import torch

    # The byte 0xhl becomes the 16-bit number 0x0h0l, whose bytes lie in that order on little-endian machines,
    # the only ones for which there is a PyTorch. Interleaving two tensors takes twice as long.
    wide = packed.to(torch.int16, memory_format=torch.contiguous_format)
    return (wide << 4).bitwise_or_(wide).bitwise_and_(0x0F0F).view(torch.uint8)


def for_each(pieces: Iterable[slice], work: Callable[[slice], None], workers: Executor | None) -> None:
    """Call ``work`` with every piece and wait for all of them; an error of one of them is raised.

    Args:
        pieces: ranges of rows, as ``row_ranges`` gives them.
        work: is called with one of them.
        workers: threads that share the pieces (see ``parallel.piece_workers``); None is this thread alone.
    """
    for _ in (map if workers is None else workers.map)(work, pieces):
        pass  # map is lazy: this waits for each piece and raises its error


def as_tensor(array: NDArray[Any]) -> torch.Tensor:
    """A copy of an array that may be mapped."""
    import torch

    array = np.array(array)
    if array.dtype.name == "bfloat16":  # NumPy has no bfloat16 of its own: hand PyTorch the bits
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
