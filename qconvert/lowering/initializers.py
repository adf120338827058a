"""From the checkpoint's tensors to a graph's initializers: cast or packed, checked, written, freed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from qconvert.errors import QconvertError
from qconvert.formats.channels import Channels, InputChannels
from qconvert.formats.columns import Int4Columns
from qconvert.formats.folding import NO_FOLDING, FoldedWeights, Folding, Weights
from qconvert.formats.layout import (
    Layout,
    NonFiniteWeightError,
    PackedWeight,
    is_finite,
    row_ranges,
    rows_name,
)
from qconvert.formats.stored import joined_name
from qconvert.lowering.data_file import DTYPES, DataFile


@dataclass(frozen=True)
class PackedValues:
    """A stored matrix ``[rows, columns]`` as initializers, by their roles (see ``formats.layout.Part``)."""

    values: tuple[tuple[str, ir.Value], ...]
    rows: int
    columns: int

    def all(self, role: str) -> list[ir.Value]:
        """The initializers of one role: several where the matrix is cut, none where it has none."""
        return [value for known, value in self.values if known == role]

    def get(self, role: str) -> ir.Value | None:
        """The only initializer of a role, or None."""
        return next(iter(self.all(role)), None)

    def __getitem__(self, role: str) -> ir.Value:
        (value,) = self.all(role)
        return value


class Initializers:
    """All initializers of one graph. Large ones go to the data file, small constants into the graph.

    Several names given at once are put side by side along the output axis.
    """

    def __init__(
        self,
        weights: Weights,
        data: DataFile,
        workers: Executor | None = None,
        folding: Folding = NO_FOLDING,
        rounded: Mapping[str, PackedWeight] | None = None,
        *,
        balance: Folding = NO_FOLDING,
        order_of: Callable[[str], torch.Tensor] | None = None,
        rounded_integers: bool = False,
    ) -> None:
        """``balance`` is the folding of the graph that is written first, ``folding`` that of ``folded``.

        ``rounded_integers``: what ``rounded`` holds is for integer products, and else for all others.
        ``order_of`` gives the order of a matrix's columns, int32 ``[K]``, where ``rounded`` has it in one.
        """
        self._checkpoint = weights
        self._weights = FoldedWeights(weights, balance)
        self._folding, self._balance = folding, balance
        self._rounded = rounded or {}  # packed already, by a calibration or in the checkpoint
        self._rounded_integers = rounded_integers
        self._order_of = order_of
        self._workers = workers
        self._data = data
        self._by_name: dict[str, ir.Value] = {}
        # What is stored packed: roles and names of its initializers.
        self._packed: dict[tuple[str, Layout], list[tuple[str, str]]] = {}

    @property
    def values(self) -> list[ir.Value]:
        return list(self._by_name.values())

    @contextmanager
    def in_another_file(self, name: str) -> Iterator[Initializers]:
        """``for_another_graph`` whose further tensors go to a data file ``name`` beside this one's."""
        with self._data.beside(name) as data:
            yield self.for_another_graph(data)

    def for_another_graph(self, data: DataFile | None = None) -> Initializers:
        """The same tensors as values of a second graph: a value belongs to one graph, the data to both."""
        kind = type(self)
        twin = kind(
            self._checkpoint,
            data or self._data,
            self._workers,
            self._folding,
            self._rounded,
            balance=self._balance,
            order_of=self._order_of,
            rounded_integers=self._rounded_integers,
        )
        twin._weights = self._weights
        for name, value in self._by_name.items():
            twin._by_name[name] = ir.Value(
                name=name, shape=value.shape, type=value.type, const_value=value.const_value
            )
        twin._packed = dict(self._packed)
        return twin

    def folded(self) -> Initializers:
        """The same for a graph of integer products, with the folded weights (see ``formats.folding``)."""
        twin = self.for_another_graph()
        twin._weights = FoldedWeights(self._checkpoint, self._folding)
        for name in [name for name in twin._by_name if name in self._folding]:
            # Stored for the other graph, whose folding is another; this one needs its own copy.
            del twin._by_name[name]
        return twin

    def constant(self, name: str, value: NDArray[np.generic]) -> ir.Value:
        """A small tensor, stored in the graph itself; the same name gives the same value."""
        if name not in self._by_name:
            tensor = ir.tensor(value, name=name)
            self._by_name[name] = ir.Value(
                name=name, shape=ir.Shape(value.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
        return self._by_name[name]

    def given(self, name: str) -> ir.Value:
        """A constant that was put in before the graph was built."""
        return self._by_name[name]

    def table(self, name: str, tensor: torch.Tensor) -> ir.Value:
        """A large tensor that does not come from the checkpoint; the same name gives the same value."""
        if name not in self._by_name:
            self._keep(self._data.add(name, [tensor], tensor.shape, _ir_dtype(tensor.dtype)))
        return self._by_name[name]

    def order(self, key: str, name: str) -> ir.Value:
        """In which order a matrix's columns are stored, int32 ``[K]``; the same key is the same order."""
        return self.table(key, self._order(name)) if key not in self._by_name else self._by_name[key]

    def _order(self, name: str) -> torch.Tensor:
        assert self._order_of is not None, "only what is kept from a checkpoint has an order"
        return self._order_of(name)

    def dense(self, names: Sequence[str], dtype: torch.dtype) -> ir.Value:
        """Checkpoint tensors in ``dtype``; the same names again give the same initializer.

        Raises:
            QconvertError: a value is NaN or Inf, or too large for ``dtype``.
        """
        joined = joined_name(names)
        if joined not in self._by_name:
            rest = self._checkpoint.shape(names[0])[1:]
            shape = (sum(self._checkpoint.shape(name)[0] for name in names), *rest)
            self._keep(self._data.add(joined, self._cast(names, dtype), shape, _ir_dtype(dtype)))
        return self._by_name[joined]

    def packed(self, names: Sequence[str], layout: Layout) -> PackedValues:
        """Checkpoint matrices in a layout; the same names again give the same initializers.

        Raises:
            QconvertError: a value is NaN or Inf.
        """
        joined = joined_name(names)
        rows = sum(self._checkpoint.shape(name)[0] for name in names)
        columns = self._checkpoint.shape(names[0])[1]
        if (joined, layout) not in self._packed:  # else a tied embedding or the other graph has stored it
            parts = layout.parts(rows, columns)
            for part, pieces in zip(parts, self._contents(names, layout), strict=True):
                value = self._data.add(f"{joined}{part.suffix}", pieces, part.shape, DTYPES[part.dtype])
                self._keep(value)
            self._packed[joined, layout] = [(part.role, f"{joined}{part.suffix}") for part in parts]
        found = self._packed[joined, layout]
        return PackedValues(tuple((role, self._by_name[name]) for role, name in found), rows, columns)

    def row_parts(self, packed: PackedValues, parts: int) -> list[PackedValues]:
        """A packed matrix as several matrices of some rows each: views of the same bytes."""
        step = -(-packed.rows // parts)
        return [
            PackedValues(
                tuple((role, self._keep(self._data.view_rows(value, rows))) for role, value in packed.values),
                rows.stop - rows.start,
                packed.columns,
            )
            for rows in (
                slice(start, min(start + step, packed.rows)) for start in range(0, packed.rows, step)
            )
        ]

    def flat_view(self, packed: PackedValues) -> ir.Value:
        """The bytes of a packed matrix, or of its upper halves, as rows for the look-up of an embedding.

        It is a view, so that a tied embedding is stored once.
        """
        tensor = packed["data"].const_value
        assert isinstance(tensor, ir.ExternalTensor)
        assert tensor.offset is not None
        assert tensor.length is not None
        width = packed.columns if packed.get("lower") is None else packed.columns // 2
        assert tensor.length == packed.rows * width, "padded rows cannot be viewed as a matrix"
        name = rows_name(str(tensor.name))
        if name in self._by_name:
            return self._by_name[name]
        return self._keep(
            self._data.view(
                name,
                tensor.dtype,
                (packed.rows, width),
                tensor.offset,
                tensor.length,
            )
        )

    def _contents(self, names: Sequence[str], layout: Layout) -> Iterable[Iterable[torch.Tensor]]:
        """The content of each of a layout's parts, in pieces."""
        return layout.pieces([self._pack(name, layout) for name in names])

    def _pack(self, name: str, layout: Layout) -> PackedWeight:
        for_integers = isinstance(layout, Channels | InputChannels)
        if name in self._rounded and for_integers is self._rounded_integers:
            try:
                packed = self._rounded[name]
                return layout.repack(packed) if isinstance(layout, Int4Columns) else packed
            except NonFiniteWeightError as error:
                raise _not_finite(name) from error
            finally:
                self._weights.release(name)
        with self._used(name) as weight:
            return layout.pack(weight, self._workers)

    @contextmanager
    def _used(self, name: str) -> Iterator[torch.Tensor]:
        try:
            yield self._weights[name]
        except NonFiniteWeightError as error:
            weight = self._weights[name]
            if is_finite(weight):
                raise _too_large(name, weight, "the scales of its blocks") from error
            raise _not_finite(name) from error
        finally:
            self._weights.release(name)

    def _cast(self, names: Sequence[str], dtype: torch.dtype) -> Iterator[torch.Tensor]:
        for name in names:
            weight = self._weights[name]
            for part in row_ranges(weight):
                piece = weight[part]
                cast = piece.to(dtype)
                if not is_finite(cast):
                    if is_finite(piece):
                        raise _too_large(name, piece, str(dtype).removeprefix("torch."))
                    raise _not_finite(name)
                yield cast
            self._weights.release(name)

    def _keep(self, value: ir.Value) -> ir.Value:
        assert value.name is not None
        assert value.name not in self._by_name, f"{value.name} is stored twice"
        self._by_name[value.name] = value
        return value


def _ir_dtype(dtype: torch.dtype) -> ir.DataType:
    return DTYPES[str(dtype).removeprefix("torch.")]


def _too_large(name: str, weight: torch.Tensor, what: str) -> QconvertError:
    return QconvertError(
        f"{name} has values that {what} cannot hold (largest: {weight.abs().max().item():.3g})",
        where=name,
        hint="use --precision fp32, int8 or int4 of --target onnxruntime",
    )


def _not_finite(name: str) -> QconvertError:
    return QconvertError(
        f"{name} holds NaN or Inf: the checkpoint is damaged",
        where=name,
        hint="download the checkpoint again, or ask whoever trained it",
    )
