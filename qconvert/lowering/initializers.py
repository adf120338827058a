"""From the checkpoint's tensors to a graph's initializers: cast or packed, checked, written, freed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from qconvert.errors import QconvertError
from qconvert.formats.blocks import NonFiniteWeightError, PackedWeight, pack, row_ranges
from qconvert.formats.channels import channel_groups, pack_int8_channels
from qconvert.formats.columns import pack_int4_columns
from qconvert.formats.folding import NO_FOLDING, FoldedWeights, Folding, Weights
from qconvert.formats.halves import split_codes
from qconvert.formats.recipe import BlockFormat
from qconvert.formats.stored import joined_name
from qconvert.lowering.data_file import DataFile


@dataclass(frozen=True)
class PackedValues:
    """A packed weight ``[rows, columns]`` as initializers (see ``quantize.PackedWeight``).

    Where it is stored in halves, ``data`` has the upper ones, ``lower`` the others ``[rows, columns / 2]``.
    """

    data: ir.Value
    scales: ir.Value
    zero_points: ir.Value | None
    rows: int
    columns: int
    lower: ir.Value | None = None


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
    ) -> None:
        self._weights = weights
        self._folding = folding
        self._rounded = rounded or {}  # packed already, by a calibration
        self._workers = workers
        self._data = data
        self._by_name: dict[str, ir.Value] = {}

    @property
    def values(self) -> list[ir.Value]:
        return list(self._by_name.values())

    @contextmanager
    def in_another_file(self, name: str) -> Iterator[Initializers]:
        """``for_another_graph`` whose further tensors go to a data file ``name`` beside this one's."""
        with DataFile(self._data.path.with_name(name)) as data:
            yield self.for_another_graph(data)

    def for_another_graph(self, data: DataFile | None = None) -> Initializers:
        """The same tensors as values of a second graph: a value belongs to one, the data to both."""
        twin = Initializers(self._weights, data or self._data, self._workers, self._folding, self._rounded)
        for name, value in self._by_name.items():
            twin._by_name[name] = ir.Value(
                name=name, shape=value.shape, type=value.type, const_value=value.const_value
            )
        return twin

    def folded(self) -> Initializers:
        """The same for a graph of integer products, whose inputs and weights share out their scales."""
        twin = self.for_another_graph()
        twin._weights = FoldedWeights(self._weights, self._folding)
        for name in [name for name in twin._by_name if name in self._folding]:
            del twin._by_name[name]  # a norm as another graph has it
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
            self._keep(self._data.add(name, [tensor], tensor.shape))
        return self._by_name[name]

    def dense(self, names: Sequence[str], dtype: torch.dtype) -> ir.Value:
        """Checkpoint tensors in ``dtype``; the same names again give the same initializer.

        Raises:
            QconvertError: a value is NaN or Inf, or too large for ``dtype``.
        """
        joined = joined_name(names)
        if joined not in self._by_name:
            first = self._weights[names[0]]
            rows = sum(self._weights[name].shape[0] for name in names)
            self._keep(self._data.add(joined, self._cast(names, dtype), (rows, *first.shape[1:])))
        return self._by_name[joined]

    def packed(self, names: Sequence[str], fmt: BlockFormat) -> PackedValues:
        """Checkpoint matrices, quantised.

        Raises:
            QconvertError: a value is NaN or Inf.
        """
        joined = joined_name(names)
        if f"{joined}.scales" in self._by_name:  # a tied embedding, or a graph beside this one has it
            return self._packed_before(joined, self._weights[names[0]], fmt)
        parts = [self._pack(name, fmt) for name in names]
        if fmt.halves:
            self._store_halves(joined, parts[0])
            return self._packed_before(joined, self._weights[names[0]], fmt)
        rows = sum(part.scales.shape[0] for part in parts)
        return PackedValues(
            self._store(f"{joined}.q{fmt.bits}", [part.data for part in parts]),
            self._store(f"{joined}.scales", [part.scales for part in parts]),
            None
            if fmt.symmetric
            else self._store(
                f"{joined}.zero_points", [part.zero_points for part in parts if part.zero_points is not None]
            ),
            rows,
            self._weights[names[0]].shape[1],
        )

    def int4_columns(
        self, names: Sequence[str], block_size: int, scale_dtype: torch.dtype
    ) -> tuple[ir.Value, ir.Value]:
        """Checkpoint matrices as int4 ``[in, out]`` and their scales (see ``int4_columns``).

        Raises:
            QconvertError: a value is NaN or Inf.
        """
        joined = joined_name(names)
        data, scales = f"{joined}.int4", f"{joined}.int4_scales"
        if data not in self._by_name:
            parts = []
            for name in names:
                with self._used(name) as weight:
                    parts.append(pack_int4_columns(weight, block_size, scale_dtype, self._workers))
            packed, steps = (torch.cat([part[index] for part in parts], dim=1) for index in (0, 1))
            shape = (packed.shape[0], packed.shape[1] * 2)
            self._keep(self._data.add(data, [packed], shape, ir.DataType.INT4))
            self._keep(self._data.add(scales, [steps], steps.shape))
        return self._by_name[data], self._by_name[scales]

    def int8_channels(self, names: Sequence[str], groups: int) -> list[tuple[ir.Value, ir.Value]]:
        """Checkpoint matrices as int8 ``[in, out]`` and their scales ``[out]`` (see ``int8_channels``).

        The output channels are cut into ``groups`` matrices of about equal width.

        Raises:
            QconvertError: a value is NaN or Inf.
        """
        joined, parts = joined_name(names), []
        for name in names:
            with self._used(name) as weight:
                parts.append(pack_int8_channels(weight, self._workers))
        data, scales = torch.cat([part[0] for part in parts], 1), torch.cat([part[1] for part in parts])
        values = []
        for group, columns in enumerate(channel_groups(len(scales), groups)):
            suffix = f".{group}" if groups > 1 else ""
            values.append(
                (
                    self._store(f"{joined}.int8{suffix}", [data[:, columns]]),
                    self._store(f"{joined}.int8_scales{suffix}", [scales[columns]]),
                )
            )
        return values

    def int8_channels_by_input(self, name: str, groups: int) -> list[tuple[ir.Value, ir.Value]]:
        """A checkpoint matrix as ``int8_channels``, each group of its inputs with scales of its own.

        Raises:
            QconvertError: a value is NaN or Inf.
        """
        with self._used(name) as weight:
            packed = [
                pack_int8_channels(weight[:, columns], self._workers)
                for columns in channel_groups(weight.shape[1], groups)
            ]
        return [
            (
                self._store(f"{name}.int8_inputs.{group}", [data]),
                self._store(f"{name}.int8_inputs_scales.{group}", [scales]),
            )
            for group, (data, scales) in enumerate(packed)
        ]

    def row_parts(self, packed: PackedValues, parts: int) -> list[PackedValues]:
        """A packed matrix as several, each some of its rows: the same bytes under further names."""
        step = -(-packed.rows // parts)
        return [
            PackedValues(
                self._keep(self._data.view_rows(packed.data, rows)),
                self._keep(self._data.view_rows(packed.scales, rows)),
                None
                if packed.zero_points is None
                else self._keep(self._data.view_rows(packed.zero_points, rows)),
                rows.stop - rows.start,
                packed.columns,
            )
            for rows in (
                slice(start, min(start + step, packed.rows)) for start in range(0, packed.rows, step)
            )
        ]

    def flat_view(self, packed: PackedValues) -> ir.Value:
        """The bytes of a packed matrix, or of its upper halves, as rows: a tied embedding is stored once."""
        tensor = packed.data.const_value
        assert isinstance(tensor, ir.ExternalTensor)
        assert tensor.offset is not None
        assert tensor.length is not None
        width = packed.columns if packed.lower is None else packed.columns // 2
        assert tensor.length == packed.rows * width, "padded rows cannot be viewed as a matrix"
        name = f"{tensor.name}.rows"
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

    def _packed_before(self, joined: str, weight: torch.Tensor, fmt: BlockFormat) -> PackedValues:
        found, rows, columns = self._by_name, *weight.shape
        scales = found[f"{joined}.scales"]
        if fmt.halves:
            upper, lower = found[f"{joined}.upper"], found[f"{joined}.lower"]
            return PackedValues(upper, scales, None, rows, columns, lower)
        zeros = None if fmt.symmetric else found[f"{joined}.zero_points"]
        return PackedValues(found[f"{joined}.q{fmt.bits}"], scales, zeros, rows, columns)

    def _store_halves(self, name: str, packed: PackedWeight) -> None:
        rows, blocks, width = packed.data.shape
        shapes = {"upper": (rows, blocks, width // 2), "lower": (rows, blocks * width // 2)}
        for half, (part, shape) in enumerate(shapes.items()):
            pieces = (split_codes(packed.data[piece])[half] for piece in row_ranges(packed.data))
            self._keep(self._data.add(f"{name}.{part}", pieces, shape))
        self._store(f"{name}.scales", [packed.scales])

    def _pack(self, name: str, fmt: BlockFormat) -> PackedWeight:
        with self._used(name) as weight:
            if name in self._rounded:
                return self._rounded[name]
            return pack(weight, fmt, self._workers)

    @contextmanager
    def _used(self, name: str) -> Iterator[torch.Tensor]:
        try:
            yield self._weights[name]
        except NonFiniteWeightError as error:
            raise _not_finite(name) from error
        finally:
            self._weights.release(name)

    def _cast(self, names: Sequence[str], dtype: torch.dtype) -> Iterator[torch.Tensor]:
        for name in names:
            weight = self._weights[name]
            for part in row_ranges(weight):
                piece = weight[part]
                cast = piece.to(dtype)
                if not bool(torch.isfinite(cast).all()):
                    if bool(torch.isfinite(piece).all()):
                        raise QconvertError(
                            f"{name} has values that {str(dtype).removeprefix('torch.')} cannot hold "
                            f"(largest: {piece.abs().max().item():.3g})",
                            where=name,
                            hint="use --precision fp32, int8 or int4",
                        )
                    raise _not_finite(name)
                yield cast
            self._weights.release(name)

    def _store(self, name: str, parts: Iterable[torch.Tensor]) -> ir.Value:
        parts = list(parts)
        return self._keep(
            self._data.add(name, parts, (sum(part.shape[0] for part in parts), *parts[0].shape[1:]))
        )

    def _keep(self, value: ir.Value) -> ir.Value:
        assert value.name is not None
        assert value.name not in self._by_name, f"{value.name} is stored twice"
        self._by_name[value.name] = value
        return value


def _not_finite(name: str) -> QconvertError:
    return QconvertError(
        f"{name} holds NaN or Inf: the checkpoint is damaged",
        where=name,
        hint="download the checkpoint again, or ask whoever trained it",
    )
