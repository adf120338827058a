"""What qrun and the proof need to know of a folder's recipe, read out of the manifest once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qrun.folder.json_file import JsonReader


@dataclass(frozen=True)
class RecipeFacts:
    """How weights were treated, as far as running or verifying them depends on it.

    Attributes:
        integer_products: the graph that decodes multiplies integers of 8 bits with one another, which takes a
            processor with exact products.
        integer_prompts: likewise of the second graph, for prompts.
        accuracy_level: of ``MatMulNBits``: 4 lets it round activations to 8 bits, block by block.
        method: the calibration by which weights were not simply rounded to nearest: "gptq", "awq", or one of
            a later version; None where all were rounded to nearest.
        kept: matrices whose codes are those that the checkpoint holds.
    """

    integer_products: bool = False
    integer_prompts: bool = False
    accuracy_level: int = 4
    method: str | None = None
    kept: int = 0


def read_recipe(reader: JsonReader) -> RecipeFacts:
    """The manifest's ``recipe``; the defaults where a folder says nothing of it.

    Raises:
        QrunError: a value of the wrong type.
    """
    if "recipe" not in reader.raw:
        return RecipeFacts()
    recipe: Mapping[str, Any] = reader.get("recipe", dict)
    level = reader.get("recipe.accuracy_level", int) if "accuracy_level" in recipe else 4
    return RecipeFacts(
        integer_products=_multiplies_integers(reader, "linear"),
        integer_prompts=_multiplies_integers(reader, "prefill"),
        accuracy_level=level,
        method=_method(reader),
        kept=_kept(reader),
    )


def _method(reader: JsonReader) -> str | None:
    if reader.raw["recipe"].get("calibration") is None:
        return None
    calibration = reader.get("recipe.calibration", dict)
    # The first folders do not name their method: there was only one.
    return reader.get("recipe.calibration.method", str) if "method" in calibration else "gptq"


def _kept(reader: JsonReader) -> int:
    if "kept" not in reader.raw["recipe"]:  # folders of earlier versions
        return 0
    return sum(group.positive("tensors") for group in reader.objects("recipe.kept"))


def _multiplies_integers(reader: JsonReader, key: str) -> bool:
    """Whether a format is anything but blocks.

    An unknown format is taken for integers, since some processors would compute those wrongly and silently:
    a refusal that was not needed does less harm than wrong answers.
    """
    if reader.raw["recipe"].get(key) is None:
        return False
    return "block_size" not in reader.get(f"recipe.{key}", dict)
