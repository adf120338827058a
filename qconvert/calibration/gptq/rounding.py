"""Rounds all layers by GPTQ, going on where an interrupted export stopped, and writes the record of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qconvert.calibration.gptq.store import HEAD, RoundedWeights
from qconvert.errors import QconvertError
from qconvert.formats.blocks import unpack
from qconvert.formats.layout import NonFiniteWeightError, PackedWeight, row_ranges
from qconvert.formats.recipe import BlockFormat, Recipe
from qconvert.formats.record import Digest, add_to_record
from qconvert.formats.stored import VOCABULARY
from qconvert.parallel import piece_workers
from qconvert.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def round_weights(
    model: PreTrainedModel,
    recipe: Recipe,
    sequences: Sequence[Sequence[int]],
    store: RoundedWeights,
    progress: Progress,
) -> None:
    """Round every linear weight of the decoder, and a head in halves, into ``store``.

    Layers that are there are not solved again.

    Raises:
        QconvertError: a weight holds NaN or Inf.
    """
    from qconvert.calibration.gptq.walk import Walk

    layers = model.config.num_hidden_layers
    halves = recipe.shortlist is not None
    wanted = [*range(layers), *([HEAD] if halves else [])]
    if all(store.layer(place) is not None for place in wanted):
        return
    with piece_workers() as workers, progress.task("rounding the weights", layers) as advance:
        walk = Walk(model, recipe, sequences, workers)
        for index in range(layers):
            known = store.layer(index)
            try:
                solved = walk.layer(index, known)
            except NonFiniteWeightError as error:
                raise not_finite(error) from error
            if known is None:
                store.add_layer(index, solved)
            advance(1)
        if halves:
            try:
                store.add_layer(HEAD, walk.head())
            except NonFiniteWeightError as error:
                raise not_finite(error) from error


def not_finite(error: NonFiniteWeightError) -> QconvertError:
    """What a user is told of a weight that cannot be rounded."""
    return QconvertError(
        f"{error} holds NaN or Inf, or makes them of the calibration text",
        where=str(error),
        hint="download the checkpoint again, or use --recipe rtn",
    )


def write_record(folder: Path, model: PreTrainedModel, recipe: Recipe, store: RoundedWeights) -> None:
    """``rounding.json``: for each weight that was rounded on purpose, the digest of what it stands for."""
    columns = {name: tensor.shape[-1] for name, tensor in model.named_parameters()}

    def digest(name: str) -> str | None:
        fmt = recipe.head if name in VOCABULARY else recipe.format_of(name)
        if fmt is None or (fmt.bits != 4 and not fmt.halves):
            return None
        return _digest(store[name], fmt, columns[name])

    names = list(store)
    with piece_workers() as workers:
        digests = zip(names, workers.map(digest, names), strict=True)
        add_to_record(folder, {name: each for name, each in digests if each is not None})


def _digest(packed: PackedWeight, fmt: BlockFormat, columns: int) -> str:
    """Of the float32 weight for which it stands, of which only some rows are made at a time."""
    digest = Digest()
    for part in row_ranges(packed.data):
        zeros = None if packed.zero_points is None else packed.zero_points[part]
        digest.add(unpack(PackedWeight(packed.data[part], packed.scales[part], zeros), fmt, columns))
    return digest.text
