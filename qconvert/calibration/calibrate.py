"""All that an export learns from a text, in as few passes of it as its recipe allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qconvert.calibration.awq import balance_and_round
from qconvert.calibration.gptq.rounding import round_weights
from qconvert.calibration.gptq.store import RoundedWeights
from qconvert.calibration.helper import Helper
from qconvert.calibration.integers import compensate_and_round
from qconvert.calibration.kv_scales import KVScales, scales_for
from qconvert.calibration.observer import Observer, observe
from qconvert.calibration.recording import write_record
from qconvert.calibration.smoothing import folding_for
from qconvert.calibration.text import CalibrationText
from qconvert.folder.tensors import save_tensors
from qconvert.formats.folding import NO_FOLDING, Folding
from qconvert.formats.recipe import ChannelFormat, Recipe
from qconvert.formats.record import FACTORS_NAME, add_to_record, digest_of
from qconvert.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Calibrated:
    """What a graph is written with.

    Attributes:
        folding: factors in the weights of integer products.
        balance: factors in the weights of all others.
        kv_scales: of an int8 KV cache.
    """

    folding: Folding
    balance: Folding
    kv_scales: KVScales


def calibrate(
    model: PreTrainedModel,
    recipe: Recipe,
    *,
    rounded: RoundedWeights | None,
    text: CalibrationText | None,
    own_text: Callable[[], CalibrationText],
    folder: Path,
    progress: Progress,
    helpers: Sequence[Helper] = (),
) -> Calibrated:
    """Look at the model on a text, and round its weights where the recipe does that on a text.

    Args:
        model: the checkpoint; nothing of it is changed.
        recipe: with the facts of ``text``.
        rounded: where weights go that are rounded on ``text``.
        text: None where all weights are rounded to nearest.
        own_text: the package's text, for a recipe that asks for more than its pass through ``text`` shows.
        folder: gets the records of what was rounded, with which the proof compares what was stored.
        progress: is told of each layer.
        helpers: processes that round layers too, for the recipe awq.

    Raises:
        QconvertError: a weight holds NaN or Inf.
    """
    observer, folding = Observer(recipe, model.config.num_hidden_layers), None
    balance, values = NO_FOLDING, NO_FOLDING
    method = None if recipe.calibration is None else recipe.calibration.method
    if rounded is not None and text is not None:
        if method == "compensated":
            assert isinstance(recipe.linear, ChannelFormat), "blocks are balanced before"
            factors = compensate_and_round(
                model, recipe.linear, text.sequences, rounded, observer=observer, progress=progress
            )
        elif method == "awq":
            factors = balance_and_round(
                model,
                recipe,
                text.sequences,
                rounded,
                progress=progress,
                watcher=observer,
                helpers=helpers,
            )
        else:
            factors = round_weights(model, recipe, text.sequences, rounded, progress)
        # These divide what is in the KV cache, so every graph that reads or fills it needs them.
        of_values = {found: each for found, each in factors.items() if found.of_values}
        values = Folding.of_inputs(of_values)
        if method == "compensated":  # the proof finds all others in what they have divided
            folding, kept = Folding.of_inputs(factors), of_values
        else:
            balance, kept = Folding.of_inputs(factors), factors
        if kept:
            divided = {found.divided: each.bfloat16() for found, each in kept.items()}
            save_tensors(divided, folder / FACTORS_NAME)
        write_record(folder, model, recipe, rounded)
    if method in (None, "gptq") and not observer.idle:
        with progress.task("looking at activations", model.config.num_hidden_layers) as advance:
            observe(model, own_text().sequences, observer, advance)
    kv_scales = scales_for(observer.kv, values)
    add_to_record(folder, {name: digest_of(scale) for name, scale in kv_scales.items()})
    if folding is None:
        folding = folding_for(recipe, model, observer)
    return Calibrated(folding | values, balance, kv_scales)
