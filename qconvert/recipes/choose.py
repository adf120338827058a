"""The recipes behind ``--recipe``: how int4 spends its bits, and what it is calibrated on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Protocol

import numpy as np

from qconvert.calibration.text import SEPARATOR, calibration_ids
from qconvert.errors import QconvertError
from qconvert.formats.recipe import BlockFormat, Calibration, Recipe
from qconvert.models.decoder import DecoderSpec

# Round to nearest; GPTQ in few bits; GPTQ with more bits where they matter most.
RECIPES = ("rtn", "gptq", "gptq-mixed")
DEFAULT_TEXT = "default"
_SEQUENCE_TOKENS = 512
_MOST_TOKENS = 32 * _SEQUENCE_TOKENS
_MIXED_BLOCK = 32  # weights in a block of "gptq-mixed"
_TEXTS = ("text.txt", "more.txt")


@dataclass(frozen=True)
class CalibrationText:
    """Token ids in sequences of one length, and what the manifest says of them."""

    sequences: tuple[tuple[int, ...], ...]
    facts: Calibration


class Options(Protocol):
    """What of ``export.ExportOptions`` is read here."""

    @property
    def recipe(self) -> str | None: ...

    @property
    def calibrate(self) -> str | None: ...

    @property
    def block_size(self) -> int | None: ...


def choose(
    recipe: Recipe, spec: DecoderSpec, options: Options, tokenizer_folder: Path
) -> tuple[Recipe, CalibrationText | None, str]:
    """``recipe``, or the calibrated one that the options ask for, its text, and its name for folders.

    Raises:
        QconvertError: options that do not fit one another, or a text that is none.
    """
    name = options.recipe or ("gptq" if options.calibrate else "rtn")
    if name == "rtn":
        if options.calibrate is not None:
            raise QconvertError(
                "--recipe rtn needs no calibration text", hint="leave one of the two options out"
            )
        return recipe, None, recipe.precision
    text = calibration_text(options.calibrate, tokenizer_folder, spec.vocab_size, spec.context_length)
    chosen = calibrated(recipe, name, spec, options.block_size, text.facts)
    return chosen, text, f"{recipe.precision}-{name}"


def calibrated(
    recipe: Recipe, name: str, spec: DecoderSpec, block_size: int | None, text: Calibration
) -> Recipe:
    """``recipe`` with the formats of a calibrated one and its calibration.

    Args:
        recipe: that of the target and precision.
        name: "gptq" or "gptq-mixed".
        spec: the decoder's sizes.
        block_size: of the 4-bit weights, or None for the recipe's own.
        text: what it will be calibrated on.

    Raises:
        QconvertError: a recipe for another precision, target, or size of model.
    """
    if name not in RECIPES:
        raise QconvertError(f"unknown recipe {name!r}", hint=f"use one of {', '.join(RECIPES)}")
    linear, head = recipe.linear, recipe.head
    if recipe.precision != "int4" or not isinstance(linear, BlockFormat) or head is None:
        raise QconvertError(
            f"--recipe {name} is for --precision int4 and --target onnxruntime",
            hint="leave --recipe and --calibrate out, or choose these",
        )
    if name == "gptq":  # the graph of plain int4, and its speed, with other codes in it
        return replace(
            recipe,
            linear=_short_scales(linear),
            head=_short_scales(head),
            exceptions={part: _short_scales(fmt) for part, fmt in recipe.exceptions.items()},
            calibration=text,
        )
    eight = [size for size in (64, 32, 16) if spec.hidden_size % size == 0]
    assert eight, "recipe_for has refused a model that cannot be cut into blocks"
    head = BlockFormat(8, eight[0], symmetric=True, scale_dtype="bfloat16")
    return replace(
        recipe,
        linear=BlockFormat(4, block_size or _MIXED_BLOCK, symmetric=False, scale_dtype="bfloat16"),
        head=head,
        shortlist=None,
        exceptions={"down_proj": head},
        calibration=text,
    )


def _short_scales(fmt: BlockFormat) -> BlockFormat:
    return replace(fmt, scale_dtype="bfloat16")


def calibration_text(
    source: str | Path | None, tokenizer_folder: Path, vocab_size: int, context_length: int
) -> CalibrationText:
    """The text behind ``--calibrate`` in sequences of one length: passages follow one another.

    Args:
        source: a UTF-8 text file; "default" or None: the package's own texts.
        tokenizer_folder: the checkpoint's.
        vocab_size: the model's.
        context_length: the model's; sequences are no longer.

    Raises:
        QconvertError: the file cannot be read or is not text, or has too little of it.
    """
    own = source is None or str(source) == DEFAULT_TEXT
    text = SEPARATOR.join(_own_texts()) if own else _read(Path(str(source)))
    sequences = calibration_ids(tokenizer_folder, vocab_size, text=text)
    tokens = [token for sequence in sequences for token in sequence][:_MOST_TOKENS]
    length = min(_SEQUENCE_TOKENS, context_length, len(tokens))
    cut = tuple(tuple(tokens[start : start + length]) for start in range(0, len(tokens) - length + 1, length))
    if not own and len(tokens) < _SEQUENCE_TOKENS:
        raise QconvertError(
            f"the calibration text has {len(tokens)} tokens, too few to see what a model does",
            where=Path(str(source)),
            hint="give a text of some thousand words, or --calibrate default",
        )
    digest = hashlib.sha256(np.array(cut, dtype=np.int64).tobytes()).hexdigest()
    name = DEFAULT_TEXT if own else Path(str(source)).name
    return CalibrationText(cut, Calibration(name, digest, len(cut) * length))


def _own_texts() -> list[str]:
    folder = files("qconvert") / "calibration"
    return [(folder / name).read_text(encoding="utf-8").strip("\n") for name in _TEXTS]


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise QconvertError(
            f"the calibration text cannot be read: {error.strerror}",
            where=file,
            hint="give a text file, or --calibrate default for the package's own text",
        ) from error
    except UnicodeDecodeError as error:
        raise QconvertError(
            "the calibration text is not UTF-8", where=file, hint="give a plain text file in UTF-8"
        ) from error
