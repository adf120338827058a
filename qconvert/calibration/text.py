"""A few thousand tokens of our own, on which a model's activations are looked at before it is quantised.

``text.txt`` holds passages of several kinds: prose, dialogue, code, Chinese, a chat in ChatML, other
languages, tables, mathematics. None of them is among the texts with which an export is verified.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np

from qconvert.errors import QconvertError

SEPARATOR = "\n=====\n"
_SEED = 20240608
_RANDOM_LENGTH = 256
_RANDOM_SEQUENCES = 8
# Tokens that are looked at together: each weight is then upcast once for all of them, and what lies between
# the layers of a 1.5B model takes 0.2 GB.
_BATCH_TOKENS = 2048


def calibration_ids(
    tokenizer_folder: Path, vocab_size: int, *, limit: int | None = None, text: str | None = None
) -> list[list[int]]:
    """Calibration sequences in the tokens of ``tokenizer.json``, each the start of a text of its own.

    Args:
        tokenizer_folder: the folder with ``tokenizer.json``; without that file, or with one of another
            vocabulary, the tokens are random (seeded): better than none, as their norms are typical.
        vocab_size: the model's.
        limit: no more tokens than that in all, cut at the end of the last sequence.
        text: passages separated by a line of ``=====``; without it, the package's own.

    Raises:
        QconvertError: the text is empty.
    """
    if text is None:
        text = (files("qconvert") / "calibration" / "text.txt").read_text(encoding="utf-8")
    passages = [passage for passage in text.split(SEPARATOR) if passage.strip()]
    if not passages:
        raise QconvertError("the calibration text is empty", hint="give a text of some thousand words")
    sequences = _encode(tokenizer_folder / "tokenizer.json", passages, vocab_size)
    if sequences is None:
        generator = np.random.default_rng(_SEED)
        sequences = generator.integers(0, vocab_size, (_RANDOM_SEQUENCES, _RANDOM_LENGTH)).tolist()
    return sequences if limit is None else _cut(sequences, limit)


def batches(sequences: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """All sequences in groups of similar length, so that little is padding; the longest come first."""
    batch: list[Sequence[int]] = []
    for sequence in sorted(sequences, key=len, reverse=True):
        if batch and (len(batch) + 1) * len(batch[0]) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(sequence)
    if batch:
        yield batch


def _encode(file: Path, passages: list[str], vocab_size: int) -> list[list[int]] | None:
    if not file.is_file():
        return None
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    sequences = [tokenizer.encode(passage, add_special_tokens=False).ids for passage in passages]
    sequences = [sequence for sequence in sequences if sequence]
    fits = sequences and max(map(max, sequences)) < vocab_size
    return sequences if fits else None


def _cut(sequences: list[list[int]], limit: int) -> list[list[int]]:
    kept: list[list[int]] = []
    for sequence in sequences:
        if limit <= 0:
            break
        kept.append(sequence[:limit])
        limit -= len(kept[-1])
    return kept
