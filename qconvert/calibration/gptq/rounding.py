"""Rounds all layers by GPTQ, going on where an interrupted export stopped, and writes the record of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qconvert.calibration.gptq.store import RoundedWeights
from qconvert.errors import QconvertError
from qconvert.formats.blocks import unpack
from qconvert.formats.layout import NonFiniteWeightError
from qconvert.formats.recipe import Recipe
from qconvert.formats.record import add_to_record, digest_of
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
    """Round every linear weight of the decoder into ``store``; layers that are there are not solved again.

    Raises:
        QconvertError: a weight holds NaN or Inf.
    """
    from qconvert.calibration.gptq.walk import Walk

    layers = model.config.num_hidden_layers
    kept = [store.layer(index) is not None for index in range(layers)]
    if all(kept):
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
        fmt = recipe.format_of(name)
        if fmt is None or fmt.bits != 4:
            return None
        return digest_of(unpack(store[name], fmt, columns[name]))

    names = list(store)
    with piece_workers() as workers:
        digests = zip(names, workers.map(digest, names), strict=True)
        add_to_record(folder, {name: each for name, each in digests if each is not None})
