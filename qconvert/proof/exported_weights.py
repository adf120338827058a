"""A model folder's weights, read back as PyTorch would compute with them, some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qconvert.checkpoint.weights import CheckpointWeights
from qconvert.errors import QconvertError
from qconvert.formats.blocks import PackedWeight, unpack
from qconvert.formats.channels import LARGEST, Int8Channels
from qconvert.formats.columns import Int4Columns
from qconvert.formats.folding import FoldedInput, Folding, folded_inputs
from qconvert.formats.halves import Halves
from qconvert.formats.recipe import BlockFormat
from qconvert.formats.shortlist import Shortlist
from qconvert.formats.stored import SHORTLIST_RANGES, SHORTLIST_SIZE, joined_name
from qconvert.models.decoder import DecoderSpec, lower_decoder
from qconvert.models.recorder import LowerDecoder, tensor_groups

if TYPE_CHECKING:
    import torch
    from transformers import Qwen2ForCausalLM


@dataclass(frozen=True)
class _Stored:
    """Where one tensor of the checkpoint lies in the graph: some rows of one to three arrays."""

    first_row: int
    shape: tuple[int, ...]
    data: NDArray[Any] | Halves
    scales: NDArray[Any] | None = None
    zero_points: NDArray[Any] | None = None
    fmt: BlockFormat | None = None
    columns: Int4Columns | Int8Channels | None = None

    @property
    def channels(self) -> Int8Channels | None:
        return self.columns if isinstance(self.columns, Int8Channels) else None


class ExportedWeights:
    """A ``reference.WeightSource``: the folder's weights under the checkpoint's names, dequantised.

    Args:
        graph: the ``model.onnx`` or ``prefill.onnx`` beside its data file.
        model: the checkpoint, for names and shapes.
        lower: which part of the decoder the graph holds.

    Attributes:
        folding: between the checkpoint's weights and the stored ones.
        description: for people.

    Raises:
        QconvertError: a tensor of the checkpoint is not in the graph, or has another shape there.
    """

    def __init__(self, graph: Path, model: Qwen2ForCausalLM, lower: LowerDecoder = lower_decoder) -> None:
        import onnx_ir

        self._graph = onnx_ir.load(graph)
        self._arrays = {name: value.const_value for name, value in self._graph.graph.initializers.items()}
        self._path = graph
        self._stored: dict[str, _Stored] = {}
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        for group in tensor_groups(DecoderSpec.from_config(model.config), lower):
            self._place(group, shapes)
        self.folding = self._recover_folding(CheckpointWeights(model), model.config.num_hidden_layers)
        self.description = "float32 (with the export's own weights)"

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def rows(self, name: str, rows: slice | torch.Tensor) -> torch.Tensor:
        """Some rows of a checkpoint tensor in float32, as the export's weights stand for them."""
        found = self.stored_rows(name, rows)
        if name not in self.folding:
            return found
        assert isinstance(rows, slice), "only the embedding is looked up, and it is not folded"
        return self.folding.undo(name, found, rows.start or 0)

    def stored_rows(self, name: str, rows: slice | torch.Tensor) -> torch.Tensor:
        """The same rows as they are stored: of the folded model, where the export is folded."""
        stored = self._stored[name]
        wanted: Any
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(stored.shape[0])
            wanted = slice(stored.first_row + start, stored.first_row + stop)
        else:
            wanted = stored.first_row + rows.numpy()

        def part(array: NDArray[Any] | Halves) -> torch.Tensor:
            return _as_tensor(np.array(array[wanted]))

        if stored.columns is not None:
            return stored.columns.rows(wanted)
        if stored.fmt is None:
            return part(stored.data).float()
        assert stored.scales is not None
        zeros = None if stored.zero_points is None else part(stored.zero_points)
        return unpack(
            PackedWeight(part(stored.data), part(stored.scales), zeros), stored.fmt, stored.shape[1]
        )

    @property
    def shortlist(self) -> Shortlist | None:
        """How the graph picks the tokens whose logits it computes from all bits of the head, if it does."""
        if SHORTLIST_RANGES not in self._arrays:
            return None
        _, ranges, _ = self.array(SHORTLIST_RANGES)
        return Shortlist(int(ranges), int(self.array(SHORTLIST_SIZE)[0]))

    def coarse_rows(self, name: str, rows: slice) -> torch.Tensor:
        """Like ``stored_rows`` of a tensor in halves, from the upper ones alone."""
        stored = self._stored[name]
        assert stored.scales is not None
        assert stored.fmt is not None
        codes = _as_tensor(Halves(self._upper(name), None)[rows])
        return unpack(
            PackedWeight(codes, _as_tensor(np.array(stored.scales[rows])), None), stored.fmt, stored.shape[1]
        )

    def release(self, name: str) -> None:
        """Nothing to do: rows are copies, and the mapped file's pages are the system's to drop."""

    @property
    def rounded(self) -> bool:
        """Whether any weight is stored in less than float32."""
        return any(stored.data.dtype != np.float32 for stored in self._stored.values())

    def dtype_of(self, name: str) -> str:
        """The element type in which a tensor is stored."""
        return str(self._stored[name].data.dtype)

    def format_of(self, name: str) -> BlockFormat | None:
        """How a tensor is quantised, or None."""
        return self._stored[name].fmt

    def scale_rounding(self, name: str) -> float:
        """The largest relative error of a quantised tensor's scales by rounding to their own type."""
        import torch

        stored = self._stored[name]
        if isinstance(stored.columns, Int4Columns):
            return torch.finfo(stored.columns.scales.dtype).eps / 2
        # quantize.pack rounds them up, by a whole unit in the last place at most.
        coarse = stored.scales is not None and stored.scales.dtype.name == "bfloat16"
        return torch.finfo(torch.bfloat16).eps if coarse else 0.0

    def array(self, initializer: str) -> NDArray[Any]:
        """An initializer of the graph as it is stored, mapped.

        Raises:
            QconvertError: there is none of that name.
        """
        tensor = self._arrays.get(initializer)
        if tensor is None:
            raise QconvertError(
                f"the graph has no tensor {initializer}", where=self._path, hint="export the model again"
            )
        array: NDArray[Any] = tensor.numpy()
        return array

    def _recover_folding(self, checkpoint: CheckpointWeights, layers: int) -> Folding:
        """The factors of integer products, from what was divided by them.

        They are not recorded anywhere else. A wrong one cannot excuse itself: the matrices that read the
        input have to hold the same one.
        """
        import torch

        factors: dict[FoldedInput, torch.Tensor] = {}
        for found in (found for layer in range(layers) for found in folded_inputs(layer)):
            if found.readers[0] not in self or self._stored[found.readers[0]].channels is None:
                continue
            true = Folding.of_inputs(factors).apply(found.divided, checkpoint[found.divided]).float()
            if (channels := self._stored[found.divided].channels) is None:
                stored = self.stored_rows(found.divided, slice(None))
            else:
                true, stored = true.abs().amax(-1) / LARGEST, channels.scales
            # Without a norm or a matrix before them, columns hold zeros, and were left alone.
            factors[found] = torch.where(true == 0, torch.ones_like(true), true / stored)
            checkpoint.release(found.divided)
        return Folding.of_inputs(factors)

    def _place(self, group: Sequence[str], shapes: dict[str, tuple[int, ...]]) -> None:
        """Find a group of tensors that stand side by side in one initializer."""
        joined, rows = joined_name(group), 0
        parts, found = self._find(joined, shapes[group[0]][1:])
        for name in group:
            self._stored[name] = _Stored(rows, shapes[name], *parts)
            rows += shapes[name][0]
        due = (rows, *shapes[group[0]][1:])
        if found != due:
            raise QconvertError(
                f"{joined} has the shape {found} in the graph, the checkpoint's is {due}",
                where=self._path,
                hint="give the checkpoint from which the folder was exported",
            )

    def _find(self, joined: str, columns: tuple[int, ...]) -> tuple[tuple[Any, ...], tuple[int, ...]]:
        """What of ``_Stored`` follows its shape, and the shape in which the graph has it."""
        if f"{joined}.int4" in self._arrays:
            turned = Int4Columns(
                self._arrays[f"{joined}.int4"], _as_tensor(np.array(self.array(f"{joined}.int4_scales")))
            )
            return (turned.data, None, None, BlockFormat(4, turned.block_size, True), turned), turned.shape
        for cut in ("int8", "int8_inputs"):
            if matrices := self._parts(f"{joined}.{cut}"):
                steps = self._parts(f"{joined}.{cut}_scales")
                channels = Int8Channels(matrices, steps, by_input=cut == "int8_inputs")
                fmt = BlockFormat(8, channels.inputs, symmetric=True)
                return (channels.data, None, None, fmt, channels), channels.shape
        if f"{joined}.lower" in self._arrays:
            scales, halves = (
                self.array(f"{joined}.scales"),
                Halves(self._upper(joined), self.array(f"{joined}.lower")),
            )
            fmt = BlockFormat(8, halves.shape[-1], True, scales.dtype.name, halves=True)
            return (halves, scales, None, fmt), (halves.shape[0], halves.shape[1] * halves.shape[2])
        names = {bits: f"{joined}.q{bits}" for bits in (4, 8)}
        bits = next((bits for bits, name in names.items() if name in self._arrays), None)
        if bits is None and f"{joined}.q8.rows" not in self._arrays:
            data = self.array(joined)
            return (data, None, None, None), data.shape
        scales = self.array(f"{joined}.scales")
        if bits is None:  # an embedding that is only looked up, as rows without blocks
            bits, rows = 8, self.array(f"{joined}.q8.rows")
            data = rows.reshape(*scales.shape, rows.shape[1] // scales.shape[1])
        else:
            data = self.array(names[bits])
        has_zeros = f"{joined}.zero_points" in self._arrays
        zero_points = self.array(f"{joined}.zero_points") if has_zeros else None
        block_size = data.shape[2] * 8 // bits
        fmt = BlockFormat(bits, block_size, symmetric=not has_zeros, scale_dtype=scales.dtype.name)
        # The last block may be filled up with zeros.
        fits = data.shape[1] == -(-columns[0] // fmt.block_size)
        width = columns[0] if fits else data.shape[1] * fmt.block_size
        return (data, scales, zero_points, fmt), (data.shape[0], width)

    def _upper(self, name: str) -> NDArray[np.uint8]:
        """The upper halves of a matrix in blocks, also where it is only looked up, as rows without blocks."""
        if f"{name}.upper" in self._arrays:
            return self.array(f"{name}.upper")
        return self.array(f"{name}.upper.rows").reshape(*self.array(f"{name}.scales").shape, -1)

    def _parts(self, name: str) -> list[NDArray[Any]]:
        """An initializer that stands in one piece, or its numbered groups; none if there is neither."""
        if name in self._arrays:
            return [self.array(name)]
        names = (f"{name}.{group}" for group in count())
        return [self.array(part) for part in takewhile(self._arrays.__contains__, names)]


def _as_tensor(array: NDArray[Any]) -> torch.Tensor:
    import torch

    if array.dtype.name == "bfloat16":  # not NumPy's own: PyTorch knows it by its bits only
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
