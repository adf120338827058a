"""Every combination of options that decides what becomes of the weights, as the command line offers them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from qconvert.errors import QconvertError
from qconvert.formats.recipe import BLOCK_SIZES, Calibration, Recipe
from qconvert.models.spec import DecoderSpec
from qconvert.recipes.choose import RECIPES, Wishes, choose
from qconvert.targets import TARGETS

TEXT = Calibration("default", "0" * 64, 1024)


@dataclass(frozen=True)
class Combination:
    target: str
    wishes: Wishes

    def __str__(self) -> str:
        """As on the command line, defaults left out."""
        wishes = self.wishes
        parts = [
            f"--target {self.target} --precision {wishes.precision}",
            f"--block-size {wishes.block_size}" if wishes.block_size else "",
            f"--recipe {wishes.recipe}" if wishes.recipe else "",
            "--prefill int8" if wishes.prefill else "",
            "--kv-cache int8" if wishes.int8_kv_cache else "",
        ]
        return " ".join(filter(None, parts))

    def recipe(self, spec: DecoderSpec) -> Recipe:
        """What it means for a model; refused with a QconvertError where it means nothing."""
        target = TARGETS[self.target]
        choice = choose(self.wishes, target.capabilities, target.fit(spec, None))
        return choice.on_text(TEXT) if choice.calibrated else choice.recipe


def offered() -> Iterator[Combination]:
    """All that can be typed, most of which fits no target."""
    precisions = dict.fromkeys(name for target in TARGETS.values() for name in target.capabilities.precisions)
    both = (False, True)
    recipes = (None, *RECIPES)
    for target, *options in product(TARGETS, precisions, (None, *BLOCK_SIZES), recipes, (None,), both, both):
        yield Combination(target, Wishes(*options))


def accepted(spec: DecoderSpec) -> list[Combination]:
    """Those that an export of such a model takes."""

    def fits(combination: Combination) -> bool:
        try:
            combination.recipe(spec)
        except QconvertError:
            return False
        return True

    return list(filter(fits, offered()))


def distinct(combinations: list[Combination], spec: DecoderSpec) -> list[Combination]:
    """Without those that name the recipe which would be taken anyway."""

    def by_default(combination: Combination) -> bool:
        if combination.wishes.recipe is None:
            return False
        unnamed = replace(combination, wishes=replace(combination.wishes, recipe=None))
        try:
            return unnamed.recipe(spec) == combination.recipe(spec)
        except QconvertError:
            return False

    return [combination for combination in combinations if not by_default(combination)]
