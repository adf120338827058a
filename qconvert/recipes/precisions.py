"""The precisions that targets offer, and the recipe that each stands for before any option changes it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qconvert.errors import QconvertError
from qconvert.formats.columns import BLOCK_SIZES as COLUMN_BLOCK_SIZES
from qconvert.formats.recipe import BLOCK_SIZES, BlockFormat, ChannelFormat, Recipe
from qconvert.models.spec import DecoderSpec

PRECISIONS = ("fp32", "fp16", "int8", "int4")
# Longer blocks are fewer bytes to read for a token. int4: a 0.5B model decodes 1.21 times as fast with 128 as
# with 32 (64: 1.10), a 1.5B model 1.04 times as fast with 256 as with 128. They cost the sample, rounded to
# nearest, a mean KL on prose of 0.302 (64: 0.254, 32: 0.243); 256 in down_proj takes the mean over prose,
# code and German from 0.456 to 0.488, with GPTQ from 0.161 to 0.164. int8: 0.006 with 64 (32: 0.004), and
# decode 1.2 to 1.4 times as fast.
DEFAULT_BLOCK_SIZES = {"int8": 64, "int4": 256}
# Of head and embedding. Longer blocks would save little: the head is a tenth of what is read for a token.
_LONGEST_HEAD_BLOCK = 128
_ACTIVATIONS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class Capabilities:
    """What a target can run, as far as recipes depend on it.

    Attributes:
        target: its name, for messages.
        precisions: those that it offers, the default first.
        activations: of packed weights.
        packed_columns: 4-bit weights are in TensorRT's layout, whose blocks must divide a matrix; else they
            are in ONNX Runtime's, whose blocks may be padded.
        integer_products: whether it multiplies integers by integers.
        int8_kv_cache: whether its attention reads keys and values of 8 bits.
        calibrated: whether its 4-bit weights can be rounded on a text.
    """

    target: str
    precisions: tuple[str, ...]
    activations: str
    packed_columns: bool = False
    integer_products: bool = False
    int8_kv_cache: bool = False
    calibrated: bool = False


def base_recipe(precision: str, block_size: int | None, target: Capabilities, spec: DecoderSpec) -> Recipe:
    """What a precision and a block size stand for, fitted to a target and to a model's sizes.

    Raises:
        QconvertError: a precision or block size that the target or the model does not allow.
    """
    if precision not in target.precisions:
        raise QconvertError(
            f"--precision {precision} is not for --target {target.target}",
            hint=f"use one of {', '.join(target.precisions)}",
        )
    if block_size is not None and precision in _ACTIVATIONS:
        raise QconvertError(
            f"--block-size {block_size} is for weights in blocks, and --precision {precision} has none",
            hint="leave --block-size out, or use --precision int4",
        )
    if target.packed_columns:
        if precision in _ACTIVATIONS:
            return Recipe(precision, _ACTIVATIONS[precision], None, None, accuracy_level=0)
        linear = BlockFormat(4, _whole_blocks(block_size, spec), symmetric=True)
        return Recipe(precision, target.activations, linear, None, accuracy_level=0)
    recipe = recipe_for(precision, spec.hidden_size, block_size)
    if isinstance(recipe.linear, ChannelFormat):
        return replace(recipe, linear=recipe.linear.fitted(spec.intermediate_size))
    return recipe if block_size else _with_fitting_blocks(recipe, spec)


def recipe_for(precision: str, hidden_size: int, block_size: int | None = None) -> Recipe:
    """The recipe of ONNX Runtime's formats for a model of ``hidden_size``.

    Without a block size, the precision's own in ``DEFAULT_BLOCK_SIZES``; int8 then has blocks in its
    embedding and head alone, and integer products everywhere else.

    Raises:
        QconvertError: an unknown precision or block size, or a model that cannot be cut into blocks.
    """
    if precision not in PRECISIONS:
        raise QconvertError(f"unknown precision {precision!r}", hint=f"use one of {', '.join(PRECISIONS)}")
    integers = precision == "int8" and block_size is None
    if block_size is None:
        block_size = DEFAULT_BLOCK_SIZES.get(precision, BLOCK_SIZES[0])
    if block_size not in BLOCK_SIZES:
        raise QconvertError(
            f"unknown block size {block_size}", hint=f"use one of {', '.join(map(str, BLOCK_SIZES))}"
        )
    if precision in _ACTIVATIONS:
        return Recipe(precision, _ACTIVATIONS[precision], None, None)
    # Rows of the embedding are looked up as they are stored: they must be whole blocks.
    longest = min(block_size, _LONGEST_HEAD_BLOCK)
    fitting = [size for size in BLOCK_SIZES if size <= longest and hidden_size % size == 0]
    if not fitting:
        raise QconvertError(
            f"hidden_size {hidden_size} is no multiple of {BLOCK_SIZES[0]}: the embedding cannot be packed",
            where="config.json: hidden_size",
            hint="use --precision fp32 or fp16",
        )
    head = BlockFormat(8, fitting[-1], symmetric=True)
    linear: BlockFormat | ChannelFormat
    if integers:
        linear = ChannelFormat()
    elif precision == "int8":
        linear = BlockFormat(8, block_size, symmetric=True)
    else:
        linear = BlockFormat(4, block_size, symmetric=False)
    return Recipe(precision, "float32", linear, head)


def _with_fitting_blocks(recipe: Recipe, spec: DecoderSpec) -> Recipe:
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


def _whole_blocks(wanted: int | None, spec: DecoderSpec) -> int:
    """The block size of TensorRT's 4 bits, which must divide every matrix along its input."""
    widths = {
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_attention_heads x head_dim": spec.query_size,
    }
    fitting = [size for size in COLUMN_BLOCK_SIZES if not any(width % size for width in widths.values())]
    if wanted is None:
        wanted = 32 if 32 in fitting else next(iter(fitting), 16)
    if wanted in fitting and not spec.intermediate_size % 2:
        return wanted
    bad = {key: width for key, width in widths.items() if width % wanted}
    names = " and ".join(f"{key} {width:,}" for key, width in bad.items())
    raise QconvertError(
        f"blocks of {wanted} weights do not fit: TensorRT takes whole blocks of "
        f"{', '.join(map(str, COLUMN_BLOCK_SIZES))}" + (f", and {names} is no multiple" if names else ""),
        where="config.json" if names else None,
        hint=f"use --block-size {fitting[-1]}" if fitting else "use --precision bf16",
    )
