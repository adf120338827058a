"""Rounds all layers by GPTQ, going on where an interrupted export stopped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qconvert.calibration.equalise import equal_columns
from qconvert.calibration.gptq.store import HEAD, RoundedWeights
from qconvert.calibration.work import Factors
from qconvert.checkpoint.weights import CheckpointWeights
from qconvert.errors import QconvertError
from qconvert.formats.folding import Folding
from qconvert.formats.layout import NonFiniteWeightError
from qconvert.formats.recipe import Recipe
from qconvert.models.families import spec_of
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
) -> Factors:
    """Round every linear weight of the decoder, and a head in halves, into ``store``.

    Layers that are there are not solved again.

    Returns:
        The factors that were folded into the weights before.

    Raises:
        QconvertError: a weight holds NaN or Inf.
    """
    from qconvert.calibration.gptq.walk import Walk

    try:
        factors = equal_columns(CheckpointWeights(model), spec_of(model.config))
    except NonFiniteWeightError as error:
        raise not_finite(error) from error
    layers = model.config.num_hidden_layers
    halves = recipe.shortlist is not None
    wanted = [*range(layers), *([HEAD] if halves else [])]
    if all(store.layer(place) is not None for place in wanted):
        return factors
    with piece_workers() as workers, progress.task("rounding the weights", layers) as advance:
        walk = Walk(model, recipe, Folding.of_inputs(factors), sequences, workers)
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
    return factors


def not_finite(error: NonFiniteWeightError) -> QconvertError:
    """What a user is told of a weight that cannot be rounded."""
    return QconvertError(
        f"{error} holds NaN or Inf, or makes them of the calibration text",
        where=str(error),
        hint="download the checkpoint again, or use --recipe rtn",
    )
