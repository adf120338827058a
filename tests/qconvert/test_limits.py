"""If these fail, a verification ends in a KeyError after minutes: a limit is asked for that its column lacks.

So it was with ``--precision int4 --recipe gptq`` for every vocabulary from 4,096 tokens on: such models have
logits in two steps, and the limit of the second step had no column for calibrated exports.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import qconvert.proof
from qconvert.formats import shortlist
from qconvert.formats.recipe import BlockFormat, Kept, Recipe
from qconvert.models.spec import DecoderSpec
from qconvert.proof.limits import COLUMNS, LIMITS, limit_value, limits_name
from qconvert.recipes.choose import Wishes, choose
from qconvert.targets import TARGETS
from tests.qconvert.combinations import accepted

LARGE = DecoderSpec(3, 4, 2, 16, 64, 128, 151_936, 1e-6, True, 256, (None, None, None))


def recipes() -> Iterator[Recipe]:
    """Every recipe that the command line can ask for, for a vocabulary as large as Qwen2.5's."""
    for combination in accepted(LARGE):
        yield combination.recipe(LARGE)
    held = {"model.layers.0.mlp.down_proj.weight": Kept(BlockFormat(4, 32, symmetric=True))}
    for int8_kv_cache in (False, True):
        wishes = Wishes(int8_kv_cache=int8_kv_cache)
        yield choose(wishes, TARGETS["onnxruntime"].capabilities, LARGE, held).recipe


def asked_of(recipe: Recipe) -> Iterator[str]:
    """The limits that the proof of such an export looks up by name."""
    yield from ("weight_steps", "near_tie", "twin_difference")
    if column_of(recipe) != "fp32":  # there is no rounding that could cost anything
        yield from ("mean_rounding", "max_rounding")
    if recipe.calibration is not None:
        yield from ("moved_steps", "common_steps")
    if recipe.shortlist is not None:
        yield "second_step"
    if recipe.kv_dtype == "int8":
        yield from ("kv_above", "kv_below")


def column_of(recipe: Recipe) -> str:
    method = None if recipe.calibration is None else recipe.calibration.method
    return limits_name(recipe.precision, method=method, kv_dtype=recipe.kv_dtype, kept=bool(recipe.kept))


def test_every_export_has_every_limit_that_its_proof_asks_for() -> None:
    seen = set()
    for recipe in recipes():
        for key in asked_of(recipe):
            limit_value(key, column_of(recipe))
            seen.add((key, column_of(recipe)))
    assert {column for _, column in seen} == set(COLUMNS)
    assert ("second_step", "int4 gptq") in seen
    # Nor does the table hold what no export can need: there it would never have been measured.
    named = {key for key, _ in seen}
    assert {(limit.key, name) for limit in LIMITS if limit.key in named for name in limit.values} == seen


def test_this_test_knows_every_limit_that_the_proof_asks_for_by_name() -> None:
    asked: set[str] = set()
    for path in Path(next(iter(qconvert.proof.__path__))).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "limit_value":
                assert isinstance(node.args[0], ast.Constant), f"{path.name}: no name that can be checked"
                asked.add(node.args[0].value)
    assert asked == {key for recipe in recipes() for key in asked_of(recipe)}


@pytest.mark.parametrize("column", COLUMNS)
def test_every_column_limits_how_far_logits_may_be_from_pytorch_s(column: str) -> None:
    judged = {(limit.key, limit.against) for limit in LIMITS if column in limit.values}
    assert ("max_difference", "checkpoint") in judged or ("mean_kl", "own weights") in judged


def test_a_vocabulary_as_large_as_real_ones_has_logits_in_two_steps() -> None:
    """Else the tests above would not see what they are for."""
    assert shortlist.worth_it(LARGE.vocab_size)
    assert any(recipe.shortlist and recipe.calibration for recipe in recipes())
