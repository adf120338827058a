"""A checkpoint's tokenizer as calibration and proof need it: a text in, all of its tokens out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def whole_texts(file: Path) -> Tokenizer:
    """The tokenizer in ``tokenizer.json``, which neither cuts a text nor pads it.

    The file may say that it does both: it was then saved by somebody who trained with short sequences.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
