"""A recipe fitted to a model's sizes, and with what single options of an export add to it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from qconvert.errors import QconvertError
from qconvert.formats import shortlist
from qconvert.formats.recipe import BLOCK_SIZES, PROMPT_GROUPS, BlockFormat, ChannelFormat, Recipe
from qconvert.models.decoder import DecoderSpec

if TYPE_CHECKING:
    from qconvert.targets import Target


def with_fitting_blocks(recipe: Recipe, spec: DecoderSpec) -> Recipe:
    """The same recipe for 4 bits, with shorter blocks rather than padded ones where they do not fit a matrix.

    Qwen2.5's matrices all are multiples of 128.
    """
    linear = recipe.linear
    if recipe.precision != "int4" or not isinstance(linear, BlockFormat):
        return recipe

    def fitting(columns: int) -> BlockFormat:
        sizes = [size for size in BLOCK_SIZES if size <= linear.block_size and columns % size == 0]
        return replace(linear, block_size=sizes[-1]) if sizes else linear

    inputs = {"o_proj": spec.query_size, "down_proj": spec.intermediate_size}
    hidden = fitting(spec.hidden_size)
    others = {part: fitting(columns) for part, columns in inputs.items()}
    exceptions = {part: fmt for part, fmt in others.items() if fmt != hidden}
    return replace(recipe, linear=hidden, exceptions={**exceptions, **recipe.exceptions})


def with_shortlist(recipe: Recipe, spec: DecoderSpec) -> Recipe:
    """A recipe for 4 bits, its head read in two steps (``formats/shortlist.py``); others as they are."""
    if recipe.precision != "int4" or recipe.head is None or not shortlist.worth_it(spec.vocab_size):
        return recipe
    return replace(recipe, head=replace(recipe.head, halves=True), shortlist=shortlist.SIZE)


def with_prefill_graph(recipe: Recipe, target: Target, spec: DecoderSpec) -> Recipe:
    """The same recipe with a second graph of integer products for prompts.

    Raises:
        QconvertError: a target or precision that has no use for it.
    """
    if target.name != "onnxruntime" or not isinstance(recipe.linear, BlockFormat):
        raise QconvertError(
            f"--prefill int8 is not for --target {target.name} --precision {recipe.precision}",
            hint="use it with --precision int4, whose products are slow for prompts",
        )
    fmt = ChannelFormat(mlp_groups=PROMPT_GROUPS)
    return replace(recipe, prefill=fmt.fitted(spec.intermediate_size))


def with_int8_kv_cache(recipe: Recipe, target: Target) -> Recipe:
    """The same recipe with keys and values of 8 bits.

    Raises:
        QconvertError: a target or precision whose attention cannot read them.
    """
    if target.name != "onnxruntime" or recipe.activations != "float32":
        raise QconvertError(
            f"--kv-cache int8 is not for --target {target.name} --precision {recipe.precision}",
            hint="use it with --target onnxruntime and --precision fp32, int8 or int4",
        )
    return replace(recipe, kv_cache="int8")
