"""The calibration text in a model's own tokens."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import pytest

from qconvert.calibration.text import SEPARATOR, calibration_ids
from qconvert.errors import QconvertError
from qconvert.proof.cases import make_cases
from tests.tiny import write_tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tiny_tokenizer(folder)
    return folder


def test_every_passage_is_a_sequence_of_its_own(tokenizer_folder: Path) -> None:
    """Massive activations sit on the first token: one long sequence would show them only once."""
    sequences = calibration_ids(tokenizer_folder, 320)
    text = (files("qconvert") / "calibration" / "text.txt").read_text(encoding="utf-8")
    assert len(sequences) == text.count(SEPARATOR) + 1 >= 8
    assert sum(map(len, sequences)) > 2_000
    # ChatML's tokens are special tokens here and not their letters.
    assert any(257 in sequence and 258 in sequence for sequence in sequences)


def test_no_passage_is_one_of_the_verification() -> None:
    """A text that calibrated the weights would flatter the export that it judges."""
    text = (files("qconvert") / "calibration" / "text.txt").read_text(encoding="utf-8")
    for file in (files("qconvert") / "data").iterdir():
        for line in file.read_text(encoding="utf-8").splitlines():
            assert len(line) < 60 or line not in text


def test_without_a_fitting_tokenizer_tokens_are_random_and_always_the_same(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    for folder, vocab_size in ((tmp_path, 320), (tokenizer_folder, 100)):
        sequences = calibration_ids(folder, vocab_size)
        assert sequences == calibration_ids(folder, vocab_size)
        assert all(0 <= token < vocab_size for sequence in sequences for token in sequence)


def test_ones_own_text_and_an_empty_one(tokenizer_folder: Path) -> None:
    assert calibration_ids(tokenizer_folder, 320, text=f"ab{SEPARATOR}c") == [[97 - 33, 98 - 33], [99 - 33]]
    with pytest.raises(QconvertError, match="empty"):
        calibration_ids(tokenizer_folder, 320, text=f" {SEPARATOR}\n")


def test_a_tokenizer_that_cuts_and_pads_is_given_whole_texts(tokenizer_folder: Path, tmp_path: Path) -> None:
    # Saved by a trainer with sequences of 8 tokens: calibration and proof then saw 8 tokens of every text.
    expected = calibration_ids(tokenizer_folder, 320), make_cases(tokenizer_folder, 320, 256).cases
    settings = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    settings["truncation"] = {
        "direction": "Right",
        "max_length": 8,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    settings["padding"] = {
        "strategy": {"Fixed": 900},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "!",
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    assert (calibration_ids(tmp_path, 320), make_cases(tmp_path, 320, 256).cases) == expected
