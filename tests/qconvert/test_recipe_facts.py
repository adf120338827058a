"""If one of these fails, a folder hides what its products are, and a processor computes them wrongly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qconvert.formats.recipe import ChannelFormat
from qconvert.recipes.choose import RECIPES, Wishes, choose
from qconvert.targets import TARGETS
from qrun.errors import QrunError
from qrun.folder.json_file import JsonReader
from qrun.folder.recipe_facts import RecipeFacts, read_recipe
from tests.qconvert.combinations import TEXT
from tests.tiny import make_tiny_checkpoint


def facts_of(recipe: Any) -> RecipeFacts:
    """Read from the JSON that a manifest holds."""
    raw = json.loads(json.dumps({"recipe": recipe}))
    return read_recipe(JsonReader(Path("qconvert.json"), raw, title="the manifest", remake="export again"))


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from qconvert.checkpoint.config import load_config
    from qconvert.models.families import spec_of

    return spec_of(load_config(make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))))


def wishes(target: Any) -> list[Wishes]:
    plain = [Wishes(precision) for precision in target.capabilities.precisions]
    if target.name != "onnxruntime":
        return plain
    return [*plain, *(Wishes("int4", recipe=name) for name in RECIPES), Wishes("int4", prefill=True)]


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_what_the_manifest_says_follows_from_the_recipe(target: Any, spec: Any) -> None:
    # "mlp_groups" in the JSON meant integer products: a field renamed in the converter would have switched
    # the guard against silent overflow off in qrun.
    found = set()
    for wish in wishes(target):
        choice = choose(wish, target.capabilities, spec)
        recipe = choice.on_text(TEXT) if choice.calibrated else choice.recipe
        facts = facts_of(recipe.to_json())
        assert facts.integer_products == isinstance(recipe.linear, ChannelFormat)
        assert facts.integer_prompts == (recipe.prefill is not None)
        assert facts.method == choice.method
        assert facts.accuracy_level == recipe.accuracy_level
        found.add((facts.integer_products, facts.integer_prompts))
    if target.name == "onnxruntime":
        assert found == {(False, False), (True, False), (False, True)}


def test_a_format_that_this_qrun_does_not_know_is_taken_for_integers() -> None:
    assert facts_of({"linear": {"groups": 8}, "head": None}).integer_products
    assert not facts_of({"linear": {"block_size": 32}, "head": None}).integer_products
    assert not facts_of({"linear": None}).integer_products


def test_the_first_calibrated_folders_are_those_of_gptq() -> None:
    assert facts_of({"calibration": {"text": "default"}}).method == "gptq"
    assert facts_of({"calibration": None}).method is None


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"calibration": 3}, '"recipe.calibration" is 3'),
        ([], '"recipe" is []'),
        ({"linear": 7}, '"recipe.linear" is 7'),
        ({"prefill": "x"}, "\"recipe.prefill\" is 'x'"),
        ({"accuracy_level": "4"}, "\"recipe.accuracy_level\" is '4'"),
    ],
)
def test_a_value_of_another_type_is_named(recipe: object, message: str) -> None:
    with pytest.raises(QrunError, match="the manifest's") as caught:
        facts_of(recipe)
    assert message in str(caught.value)
