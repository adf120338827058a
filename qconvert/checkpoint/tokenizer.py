"""A checkpoint's tokenizer: tokenizer.json, or what transformers makes of the older files in its place."""

from __future__ import annotations

import codecs
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from qconvert.errors import QconvertError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# What checkpoints had before there was a tokenizer.json.
FROM_THESE = ("vocab.json", "merges.txt")


def tokenizer_json(folder: Path) -> bytes | None:
    """The content of ``tokenizer.json``, which is made where only older files are there; None without those.

    Raises:
        QconvertError: transformers cannot make a tokenizer of the older files.
    """
    path = folder / "tokenizer.json"
    if path.is_file():
        return path.read_bytes().removeprefix(codecs.BOM_UTF8)
    if not all((folder / name).is_file() for name in FROM_THESE):
        return None
    stamps = [(folder / name).stat() for name in FROM_THESE]
    return _convert(folder.resolve(), *((each.st_size, each.st_mtime_ns) for each in stamps))


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint or an export; None where nothing is there to make it of.

    Raises:
        QconvertError: the file is no tokenizer.
    """
    from tokenizers import Tokenizer

    content = tokenizer_json(folder)
    if content is None:
        return None
    try:
        return Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises a bare Exception for whatever is wrong with the file
        raise QconvertError(
            f"no tokenizer can be made of tokenizer.json: {error}",
            where=folder / "tokenizer.json",
            hint="download the file again, or copy it from the model that this one was trained from",
        ) from error


def whole_texts(folder: Path) -> Tokenizer | None:
    """The same tokenizer, which neither cuts a text nor pads it.

    ``tokenizer.json`` may say that it does both: it was then saved by somebody who trained with short
    sequences.
    """
    tokenizer = read_tokenizer(folder)
    if tokenizer is not None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
    return tokenizer


@lru_cache(maxsize=4)
def _convert(folder: Path, *stamps: tuple[int, int]) -> bytes:
    """transformers' own conversion, with what tokenizer_config.json says of added tokens.

    Args:
        folder: with the older files.
        stamps: size and time of each, so that changed files are converted again.

    Nothing is downloaded, and no code of the checkpoint's runs.
    """
    from transformers import AutoTokenizer, Qwen2Tokenizer
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        kind = AutoTokenizer if (folder / "config.json").is_file() else Qwen2Tokenizer
        made = kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False, use_fast=True)
        return str(made.backend_tokenizer.to_str()).encode()
    except Exception as error:  # transformers has no error class of its own
        raise QconvertError(
            f"no tokenizer.json can be made of {' and '.join(FROM_THESE)}: {' '.join(str(error).split())}",
            where=folder / FROM_THESE[0],
            hint="download both again, or copy tokenizer.json from the model that this one was trained from",
        ) from error
    finally:
        logging.set_verbosity(verbosity)
