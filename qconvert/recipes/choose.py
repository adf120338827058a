"""The one maker of recipes: what the options of an export mean for a target and a model.

``export`` writes what it says, ``inspect`` forecasts it, and both refuse what it refuses, before any work.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from qconvert.errors import QconvertError
from qconvert.formats import shortlist
from qconvert.formats.recipe import (
    PROMPT_GROUPS,
    BlockFormat,
    Calibration,
    ChannelFormat,
    Kept,
    Method,
    Recipe,
)
from qconvert.formats.stored import VOCABULARY
from qconvert.models.spec import DecoderSpec
from qconvert.recipes.forecast import parameter_count
from qconvert.recipes.kept import keepable
from qconvert.recipes.precisions import Capabilities, base_recipe, recipe_for

# Balance inputs, round in groups; round to nearest; GPTQ. "mixed": with more bits where they matter.
RECIPES = ("awq", "awq-mixed", "rtn", "gptq", "gptq-mixed")
# The formats of a choice between size and exactness; docs/figures.md, "Quality", shows what each costs.
QUALITIES: Mapping[str, tuple[str, str | None]] = {
    "fast": ("int4", None),
    "balanced": ("int4", "awq-mixed"),
    "best": ("int8", None),
}
# Tokens of the calibration text that a recipe reads at most; twice as many gain awq nothing. Of a large model
# awq reads half: reading would take twice as long as rounding (mean KL of the sample 0.185, with half 0.193).
_TOKENS: Mapping[Method, int] = {"awq": 4_096, "compensated": 4_096, "gptq": 16384}
_LARGE, _TOKENS_OF_LARGE = 3_000_000_000, 2_048
_MIXED = "-mixed"
_MIXED_BLOCK = 32  # weights in a block of a mixed recipe
# Of down_proj in a calibrated recipe: its inputs are the most uneven, and a calibration gains more from short
# blocks than rounding to nearest does. Mean KL of the sample with awq: 0.196 with 256 (88.3 MB), 0.183 with
# 128 (88.6), 0.167 with 64 (89.1), 0.150 with 32 (90.2).
_DOWN_BLOCK = 128
# gptq is for those who want the least error at these bytes, and may read prompts a little slower for it: the
# sample's mean KL was 0.147 in the blocks above (88.6 MB) and 0.130 in these (89.7 MB), before columns were
# made equal and more was added to the diagonal.
_GPTQ_BLOCKS = {"down_proj": 64, "q_proj": 32, "k_proj": 32, "v_proj": 32}
_GPTQ_SHORTLIST = 512
_ONE_PRECISION = "leave --recipe and --calibrate out, or use --precision int4"


@dataclass(frozen=True)
class Wishes:
    """Those options of an export that decide what becomes of its weights; None is the default.

    Attributes:
        precision: of the weights.
        block_size: weights that share a scale.
        recipe: one of ``RECIPES``. None: "gptq" where there is a calibration text; else, if the checkpoint's
            tokenizer can read a text, "awq" for 4 bits of a target that can be calibrated, and for integer
            products what ``calibration/integers.py`` does; else "rtn".
        calibrate: the file of a calibration text, or "default" for the package's own.
        prefill: whether a second graph reads prompts.
        int8_kv_cache: whether keys and values are kept in 8 bits.
        int8_head: whether embedding and head are rounded to 8 bits where a checkpoint's codes are kept.
    """

    precision: str | None = None
    block_size: int | None = None
    recipe: str | None = None
    calibrate: str | None = None
    prefill: bool = False
    int8_kv_cache: bool = False
    int8_head: bool = False


@dataclass(frozen=True)
class Choice:
    """A recipe, the name of its kind in default folder names, and what has to read a text for it, if any.

    ``large``: the model has more than ``_LARGE`` parameters.
    """

    recipe: Recipe
    name: str
    method: Method | None = None
    large: bool = False

    @property
    def calibrated(self) -> bool:
        """Whether weights are rounded on a text."""
        return self.method is not None

    @property
    def tokens(self) -> int:
        """How many of its tokens are read at most."""
        assert self.method is not None
        return _TOKENS_OF_LARGE if self.large and self.method != "gptq" else _TOKENS[self.method]

    def on_text(self, facts: Calibration) -> Recipe:
        """The recipe, with the text on which it was calibrated."""
        assert self.method is not None
        return replace(self.recipe, calibration=replace(facts, method=self.method))


def choose(
    wishes: Wishes,
    target: Capabilities,
    spec: DecoderSpec,
    held: Mapping[str, Kept] | None = None,
    *,
    reads_text: bool = True,
    coarse: Collection[str] = (),
) -> Choice:
    """What the options mean for a target and a model of these sizes.

    Args:
        wishes: the options.
        target: what it can run.
        spec: the model.
        held: matrices that the checkpoint holds in codes which can be kept.
        reads_text: whether the checkpoint has a tokenizer for its vocabulary.
        coarse: matrices that the checkpoint holds quantised, in codes that can be kept or not.

    Raises:
        QconvertError: options that do not fit one another, the target or the model.
    """
    kept = {} if wishes.precision is not None else keepable(target, held or {})
    if kept and not (wishes.int8_head and target.packed_columns):
        return _keep(wishes, target, spec, kept, coarse)
    if wishes.int8_head:
        raise QconvertError(
            "--head int8 is for checkpoints whose own codes are kept, and for --target onnxruntime",
            hint="leave it out: int8 and int4 round embedding and head by themselves",
        )
    precision = wishes.precision or target.precisions[0]
    usual = "awq" if precision == "int4" and target.calibrated else "rtn"
    name = _recipe_name(wishes, usual if reads_text else "rtn")
    if name.startswith("awq") and not reads_text:
        raise QconvertError(
            f"--recipe {name} looks at the model's activations on a text, and the checkpoint has no "
            "tokenizer for its vocabulary",
            hint="use --recipe rtn, or put the tokenizer beside the weights",
        )
    recipe = base_recipe(precision, wishes.block_size, target, spec)
    if name != "rtn":
        recipe = _calibrated(recipe, name, wishes.block_size, target, spec)
    if not name.endswith(_MIXED):
        recipe = _with_shortlist(recipe, spec, _GPTQ_SHORTLIST if name == "gptq" else shortlist.SIZE)
    if precision == "int8" and recipe.head is not None:
        recipe = replace(recipe, head_residual=True)
    if wishes.int8_kv_cache:
        recipe = _with_int8_kv_cache(recipe, target)
    if wishes.prefill:
        recipe = _with_prefill_graph(recipe, target, spec)
    method = _method_of(name)
    if isinstance(recipe.linear, ChannelFormat):
        usual = "compensated" if reads_text else "rtn"
        if wishes.recipe is None:
            name = usual
        method = "compensated" if name == "compensated" else None
    called = precision if name == usual else f"{precision}-{name}"
    return Choice(recipe, called, method, parameter_count(spec) > _LARGE)


def _keep(
    wishes: Wishes,
    target: Capabilities,
    spec: DecoderSpec,
    kept: Mapping[str, Kept],
    coarse: Collection[str],
) -> Choice:
    """The codes as they are, everything else in the activations' type.

    An embedding or a head in other codes is rounded to 8 bits: in floats it would outweigh all the rest.
    """
    for option, value in (
        ("--block-size", wishes.block_size),
        ("--recipe", wishes.recipe),
        ("--calibrate", wishes.calibrate),
    ):
        if value is not None:
            raise QconvertError(
                f"{option} {value} is for weights that are rounded, and this checkpoint's are kept",
                hint="leave it out; or round its weights a second time, with --precision int4",
            )
    precision = f"int{min(each.fmt.bits for each in kept.values())}"
    rounded = wishes.int8_head or any(name in coarse and name not in kept for name in VOCABULARY)
    recipe = Recipe(
        precision,
        target.activations,
        None,
        recipe_for("int8", spec.hidden_size).head if rounded and not target.packed_columns else None,
        accuracy_level=0 if target.packed_columns else 4,
        kept=kept,
    )
    if wishes.int8_kv_cache:
        recipe = _with_int8_kv_cache(recipe, target)
    if wishes.prefill:
        recipe = _with_prefill_graph(recipe, target, spec)
    return Choice(recipe, f"{precision}-kept")


def _method_of(name: str) -> Method | None:
    return None if name == "rtn" else "awq" if name.startswith("awq") else "gptq"


def _recipe_name(wishes: Wishes, usual: str) -> str:
    name = wishes.recipe or (usual if wishes.calibrate is None else "gptq")
    if name not in RECIPES:
        raise QconvertError(f"unknown recipe {name!r}", hint=f"use one of {', '.join(RECIPES)}")
    if name == "rtn" and wishes.calibrate is not None:
        raise QconvertError("--recipe rtn needs no calibration text", hint="leave one of the two options out")
    return name


def _calibrated(
    recipe: Recipe, name: str, block_size: int | None, target: Capabilities, spec: DecoderSpec
) -> Recipe:
    """The formats of a recipe whose weights a calibration will round."""
    linear, head, mixed = recipe.linear, recipe.head, name.endswith(_MIXED)
    if not target.calibrated or recipe.precision != "int4":
        raise QconvertError(f"--recipe {name} is for --precision int4", hint=_ONE_PRECISION)
    if target.packed_columns and name != "awq":
        reason = f": it has matrices of 8 bits, and --target {target.target} has none" if mixed else ""
        raise QconvertError(
            f"--recipe {name} is for --target onnxruntime{reason}",
            hint="use --recipe awq or rtn without --calibrate, or --target onnxruntime",
        )
    assert isinstance(linear, BlockFormat)
    if target.packed_columns:  # the type in which scales are stored there, so that codes are made for them
        return replace(recipe, linear=replace(linear, scale_dtype=target.activations))
    assert head is not None
    if not mixed:
        # The formats of plain int4 except for the scales' type and the blocks of down_proj.
        exceptions = dict(recipe.exceptions)
        longest = _GPTQ_BLOCKS if name == "gptq" else {"down_proj": _DOWN_BLOCK}
        for part, size in longest.items() if block_size is None else ():
            usual = exceptions.get(part, linear)
            if usual.block_size > size:
                exceptions[part] = replace(usual, block_size=size)
        return replace(
            recipe,
            linear=_short_scales(linear),
            head=_short_scales(head),
            exceptions={part: _short_scales(fmt) for part, fmt in exceptions.items()},
        )
    size = next(size for size in (64, 32, 16) if spec.hidden_size % size == 0)
    head = BlockFormat(8, size, symmetric=True, scale_dtype="bfloat16")
    linear = BlockFormat(4, block_size or _MIXED_BLOCK, symmetric=False, scale_dtype="bfloat16")
    return replace(recipe, linear=linear, head=head, exceptions={"down_proj": head})


def _short_scales(fmt: BlockFormat) -> BlockFormat:
    return replace(fmt, scale_dtype="bfloat16")


def _with_shortlist(recipe: Recipe, spec: DecoderSpec, size: int) -> Recipe:
    """A recipe for 4 bits with its head read in two steps (``formats/shortlist.py``); others as they are.

    gptq has the two steps as well, with twice as many tokens in the second: on the sample a mean KL of
    0.130 in place of 0.132.
    """
    if recipe.precision != "int4" or recipe.head is None or not shortlist.worth_it(spec.vocab_size):
        return recipe
    return replace(recipe, head=replace(recipe.head, halves=True), shortlist=size)


def _with_prefill_graph(recipe: Recipe, target: Capabilities, spec: DecoderSpec) -> Recipe:
    """The same recipe with a second graph of integer products for prompts.

    Where the first graph has integer products too, it is slow for prompts with a cache of 8 bits alone, and
    both graphs share its matrices.
    """
    if isinstance(recipe.linear, ChannelFormat) and recipe.kv_cache is not None:
        return replace(recipe, prefill=recipe.linear)
    if not target.integer_products or not (recipe.kept or isinstance(recipe.linear, BlockFormat)):
        raise QconvertError(
            f"--prefill int8 is not for --target {target.target} --precision {recipe.precision}",
            hint="use it with --target onnxruntime, --precision int4, whose products are slow for prompts, "
            "or with --precision int8 --kv-cache int8, whose attention is",
        )
    fmt = ChannelFormat(mlp_groups=PROMPT_GROUPS)
    return replace(recipe, prefill=fmt.fitted(spec.intermediate_size))


def _with_int8_kv_cache(recipe: Recipe, target: Capabilities) -> Recipe:
    """The same recipe with keys and values of 8 bits."""
    if not target.int8_kv_cache or recipe.activations != "float32":
        raise QconvertError(
            f"--kv-cache int8 is not for --target {target.target} --precision {recipe.precision}",
            hint="use it with --target onnxruntime and --precision fp32, int8 or int4",
        )
    return replace(recipe, kv_cache="int8")
