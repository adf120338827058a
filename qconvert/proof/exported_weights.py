"""A model folder's weights, read back as PyTorch would compute with them, some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from qconvert.checkpoint.weights import CheckpointWeights
from qconvert.errors import QconvertError
from qconvert.formats.channels import LARGEST, StoredChannels, StoredInputChannels
from qconvert.formats.columns import StoredColumns
from qconvert.formats.folding import LARGEST_FACTOR, FoldedInput, Folding, folded_inputs, value_input
from qconvert.formats.halves import StoredHalves
from qconvert.formats.layout import Arrays, Rounding, Stored
from qconvert.formats.record import FACTORS_NAME
from qconvert.formats.shortlist import Shortlist
from qconvert.formats.stored import SHORTLIST_RANGES, SHORTLIST_SIZE, find, is_stored, joined_name
from qconvert.models.decoder import lower_decoder
from qconvert.models.families import spec_of
from qconvert.models.recorder import LowerDecoder, tensor_groups
from qconvert.models.spec import DecoderSpec

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class _Place:
    """Where one tensor of the checkpoint lies in the graph: in some rows of what is stored."""

    stored: Stored
    first_row: int
    shape: tuple[int, ...]


class ExportedWeights:
    """A ``reference.WeightSource``: the folder's weights under the checkpoint's names, dequantised.

    Args:
        graph: the ``model.onnx`` or ``prefill.onnx`` beside its data file.
        model: the checkpoint, for names and shapes.
        lower: which part of the decoder the graph holds.
        recorded: factors that were folded into matrices in blocks before they were rounded, by the tensor
            that they divide (``formats/record.py``).

    Attributes:
        folding: between the checkpoint's weights and the stored ones.
        recovered: tensors from which its factors were taken, so that they cannot be checked by these factors.
        description: for people.

    Raises:
        QconvertError: a tensor of the checkpoint is not in the graph, or has another shape there; or a
            recorded factor cannot be one.
    """

    def __init__(
        self,
        graph: Path,
        model: PreTrainedModel,
        lower: LowerDecoder = lower_decoder,
        recorded: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self._arrays = Arrays(graph)
        self._path = graph
        self._stored: dict[str, _Place] = {}
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        for group in tensor_groups(spec_of(model.config), lower):
            self._place(group, shapes)
        factors = self._recorded_factors(recorded or {}, spec_of(model.config), shapes)
        recovered = self._recover_factors(CheckpointWeights(model), model.config.num_hidden_layers)
        self.recovered = {found.divided for found in recovered}
        self.folding = Folding.of_inputs({**factors, **recovered})
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
        place = self._stored[name]
        if not isinstance(rows, slice):
            return place.stored.rows(place.first_row + rows.numpy())
        start, stop, _ = rows.indices(place.shape[0])
        return place.stored.rows(slice(place.first_row + start, place.first_row + stop))

    @property
    def shortlist(self) -> Shortlist | None:
        """How the graph picks the tokens whose logits it computes from all bits of the head, if it does."""
        if SHORTLIST_RANGES not in self._arrays:
            return None
        _, ranges, _ = self.array(SHORTLIST_RANGES)
        return Shortlist(int(ranges), int(self.array(SHORTLIST_SIZE)[0]))

    def coarse_rows(self, name: str, rows: slice) -> torch.Tensor:
        """Like ``stored_rows`` of a tensor in halves, from the upper ones alone."""
        stored = self._stored[name].stored
        assert isinstance(stored, StoredHalves), "a shortlist has a head in halves"
        return stored.coarse_rows(rows)

    def release(self, name: str) -> None:
        """Nothing to do: rows are copies, and the mapped file's pages are the system's to drop."""

    @property
    def rounded(self) -> bool:
        """Whether any weight is stored in less than float32."""
        return any(place.stored.dtype != "float32" for place in self._stored.values())

    def dtype_of(self, name: str) -> str:
        """The element type in which a tensor is stored."""
        return self._stored[name].stored.dtype

    def rounding_of(self, name: str) -> Rounding | None:
        """How coarse a tensor's values are, or None where they were cast at most."""
        return self._stored[name].stored.rounding

    def scale_rounding(self, name: str) -> float:
        """The largest relative error of a quantised tensor's scales by rounding to their own type."""
        return self._stored[name].stored.scale_rounding

    def code_rounding(self, name: str) -> float:
        """The largest relative error of values whose codes are right: their scales may be stored coarser."""
        stored = self._stored[name].stored
        return stored.scale_rounding if isinstance(stored, StoredColumns) else 0.0

    def array(self, initializer: str) -> NDArray[Any]:
        """An initializer of the graph as it is stored, mapped.

        Raises:
            QconvertError: there is none of that name.
        """
        return self._arrays[initializer]

    def _recorded_factors(
        self, recorded: Mapping[str, torch.Tensor], spec: DecoderSpec, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[FoldedInput, torch.Tensor]:
        """Those recorded factors that this graph was folded with.

        A wrong one cannot excuse itself: what it divides has to be divided by it, norms and biases to the
        last bit, and the matrices that read the input have to be multiplied with the same one.
        """
        factors: dict[FoldedInput, torch.Tensor] = {}
        for layer in range(spec.num_hidden_layers if recorded else 0):
            values = value_input(layer, spec.num_attention_heads, spec.num_key_value_heads)
            for found in (*folded_inputs(layer), values):
                # Values are divided in every graph, since they meet in one KV cache.
                if found.divided not in self or (self._for_integers(found) and not found.of_values):
                    continue
                factor = recorded.get(found.divided)
                if factor is None or not _usable(factor, shapes[found.divided][:1]):
                    raise QconvertError(
                        f"the factors of {found.divided} are not recorded, or are none",
                        where=self._path.with_name(FACTORS_NAME),
                        hint="export the model again",
                    )
                factors[found] = factor
        return factors

    def _recover_factors(self, checkpoint: CheckpointWeights, layers: int) -> dict[FoldedInput, torch.Tensor]:
        """The factors of integer products, from what was divided by them.

        They are not recorded anywhere else. A wrong one cannot excuse itself: the matrices that read the
        input have to hold the same one.
        """
        import torch

        factors: dict[FoldedInput, torch.Tensor] = {}
        for found in (found for layer in range(layers) for found in folded_inputs(layer)):
            if not self._for_integers(found):
                continue
            true = Folding.of_inputs(factors).apply(found.divided, checkpoint[found.divided]).float()
            divided = self._stored[found.divided].stored
            if isinstance(divided, StoredChannels):
                true, stored = true.abs().amax(-1) / LARGEST, divided.scales
            else:
                stored = self.stored_rows(found.divided, slice(None))
            # Where the checkpoint holds only zeros there is nothing to divide: factor 1.
            factors[found] = torch.where(true == 0, torch.ones_like(true), true / stored)
            checkpoint.release(found.divided)
        return factors

    def _for_integers(self, found: FoldedInput) -> bool:
        """Whether an input is read by integer products."""
        name = found.readers[0]
        return name in self and isinstance(self._stored[name].stored, StoredChannels | StoredInputChannels)

    def _place(self, group: Sequence[str], shapes: dict[str, tuple[int, ...]]) -> None:
        """Find a group of tensors that stand side by side in one initializer."""
        rows, rest = 0, shapes[group[0]][1:]
        if len(group) > 1 and not is_stored(self._arrays, group):
            for name in group:  # kept as the checkpoint has them, each in a way of its own
                self._place([name], shapes)
            return
        stored = find(self._arrays, group, *rest)
        for name in group:
            self._stored[name] = _Place(stored, rows, shapes[name])
            rows += shapes[name][0]
        due = (rows, *rest)
        if stored.shape != due:
            raise QconvertError(
                f"{joined_name(group)} has the shape {stored.shape} in the graph, the checkpoint's is {due}",
                where=self._path,
                hint="give the checkpoint from which the folder was exported",
            )


def _usable(factors: torch.Tensor, shape: tuple[int, ...]) -> bool:
    """Whether such factors can have been folded: within bounds (so no NaN), and one for each row."""
    if tuple(factors.shape) != shape:
        return False
    return float(factors.min()) >= 1 / LARGEST_FACTOR and float(factors.max()) <= LARGEST_FACTOR
