"""Texts on which a model's activations are looked at before it is quantised: our own, or the user's.

``text.txt`` holds passages of several kinds: prose, dialogue, code, Chinese, a chat in ChatML, other
languages, tables, mathematics. None of them is among the texts with which an export is verified.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np

from qconvert.checkpoint.tokenizer import read_tokenizer
from qconvert.errors import QconvertError
from qconvert.formats.recipe import Calibration

DEFAULT_TEXT = "default"
SEPARATOR = "\n=====\n"
_SEED = 20240608
_RANDOM_LENGTH = 256
_RANDOM_SEQUENCES = 8
# Rounding reads up to 16,384 tokens of both of the package's texts, the other calibrations less.
_SEQUENCE_TOKENS = 512
_MOST_TOKENS = 32 * _SEQUENCE_TOKENS
# Sequences are short enough to come from as many places of the text.
_PLACES = 16
_TEXTS = ("text.txt", "more.txt")


@dataclass(frozen=True)
class CalibrationText:
    """Token ids in sequences of one length, and what the manifest says of them."""

    sequences: tuple[tuple[int, ...], ...]
    facts: Calibration


def calibration_ids(tokenizer_folder: Path, vocab_size: int, *, text: str | None = None) -> list[list[int]]:
    """Calibration sequences in the tokens of the checkpoint's tokenizer, each the start of a text of its own.

    Args:
        tokenizer_folder: the folder with the tokenizer; without one, or with one of another
            vocabulary, the tokens are random (seeded): better than none, as their norms are typical.
        vocab_size: the model's.
        text: passages separated by a line of ``=====``; without it, the package's own.

    Raises:
        QconvertError: the text is empty.
    """
    if text is None:
        text = (files("qconvert") / "calibration" / "text.txt").read_text(encoding="utf-8")
    passages = [passage for passage in text.split(SEPARATOR) if passage.strip()]
    if not passages:
        raise QconvertError("the calibration text is empty", hint="give a text of some thousand words")
    sequences = _encode(tokenizer_folder, passages, vocab_size)
    if sequences is None:
        generator = np.random.default_rng(_SEED)
        sequences = generator.integers(0, vocab_size, (_RANDOM_SEQUENCES, _RANDOM_LENGTH)).tolist()
    return sequences


def calibration_text(
    source: str | Path | None,
    tokenizer_folder: Path,
    vocab_size: int,
    context_length: int,
    most_tokens: int = _MOST_TOKENS,
) -> CalibrationText:
    """The text behind ``--calibrate`` in sequences of one length: passages follow one another.

    Args:
        source: a UTF-8 text file; "default" or None: the package's own texts.
        tokenizer_folder: the checkpoint's.
        vocab_size: the model's.
        context_length: the model's; sequences are no longer.
        most_tokens: how many are taken, at places spread over the text.

    Raises:
        QconvertError: the file cannot be read or is not text, or has too little of it.
    """
    own = source is None or str(source) == DEFAULT_TEXT
    text = SEPARATOR.join(_own_texts()) if own else _read(Path(str(source)))
    sequences = calibration_ids(tokenizer_folder, vocab_size, text=text)
    tokens = [token for sequence in sequences for token in sequence]
    length = min(_SEQUENCE_TOKENS, max(1, most_tokens // _PLACES), context_length, len(tokens))
    starts = range(0, len(tokens) - length + 1, length)
    count = min(len(starts), max(1, most_tokens // length))
    # Spread over the text, since each of its passages is of another kind.
    chosen = [starts[place * len(starts) // count] for place in range(count)]
    cut = tuple(tuple(tokens[start : start + length]) for start in chosen)
    if not own and len(tokens) < _SEQUENCE_TOKENS:
        raise QconvertError(
            f"the calibration text has {len(tokens)} tokens, too few to see what a model does",
            where=Path(str(source)),
            hint="give a text of some thousand words, or --calibrate default",
        )
    digest = hashlib.sha256(np.array(cut, dtype=np.int64).tobytes()).hexdigest()
    name = DEFAULT_TEXT if own else Path(str(source)).name
    return CalibrationText(cut, Calibration(name, digest, len(cut) * length))


def reads_text(tokenizer_folder: Path, vocab_size: int) -> bool:
    """Whether the checkpoint has a tokenizer, and its tokens are the model's."""
    return _encode(tokenizer_folder, _own_texts(), vocab_size) is not None


def _encode(folder: Path, passages: list[str], vocab_size: int) -> list[list[int]] | None:
    tokenizer = read_tokenizer(folder)
    if tokenizer is None:
        return None
    sequences = [tokenizer.encode(passage, add_special_tokens=False).ids for passage in passages]
    sequences = [sequence for sequence in sequences if sequence]
    fits = sequences and max(map(max, sequences)) < vocab_size
    return sequences if fits else None


def _own_texts() -> list[str]:
    folder = files("qconvert") / "calibration"
    return [(folder / name).read_text(encoding="utf-8").strip("\n") for name in _TEXTS]


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
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
