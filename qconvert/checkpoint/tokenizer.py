"""A checkpoint's tokenizer: tokenizer.json, or what transformers makes of the older files in its place."""

from __future__ import annotations

import codecs
import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qconvert.errors import QconvertError
from qrun.text.added_tokens import text_of
from qrun.text.tokenizer import add_folders_tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# What checkpoints had before there was a tokenizer.json.
FROM_THESE = ("vocab.json", "merges.txt")
_ADDED = ("tokenizer_config.json", "added_tokens.json")  # what they say of added tokens


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
    return _convert(folder.resolve(), _stamps(folder))


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint or an export, a text in and all of its tokens out.

    ``tokenizer.json`` may say that texts are cut and padded: it was then saved by somebody who trained with
    short sequences. Here they are not.

    Returns:
        The same object for the same files; None where nothing is there to make it of.

    Raises:
        QconvertError: the file is no tokenizer, or none can be made of the older files.
        QrunError: a file beside it is not what it should be.
    """
    return _read(folder.resolve(), _stamps(folder))


@lru_cache(maxsize=4)
def _read(folder: Path, stamps: tuple[object, ...]) -> Tokenizer | None:
    from tokenizers import Tokenizer

    content = tokenizer_json(folder)
    if content is None:
        return None
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises a bare Exception for whatever is wrong with the file
        raise QconvertError(
            f"no tokenizer can be made of tokenizer.json: {error}",
            where=folder / "tokenizer.json",
            hint="download the file again, or copy it from the model that this one was trained from",
        ) from error
    add_folders_tokens(tokenizer, folder)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _stamps(folder: Path) -> tuple[object, ...]:
    """Size and time of the files that say something of the tokenizer: changed ones are read again."""
    names = ("tokenizer.json", *FROM_THESE, *_ADDED, "special_tokens_map.json", "config.json")
    found = {name: (folder / name).stat() for name in names if (folder / name).is_file()}
    return tuple((name, status.st_size, status.st_mtime_ns) for name, status in found.items())


@lru_cache(maxsize=4)
def _convert(folder: Path, stamps: tuple[object, ...]) -> bytes:
    """transformers' own conversion, with what the folder says of added tokens.

    Nothing is downloaded, and no code of the checkpoint's runs.
    """
    from transformers import AutoTokenizer, Qwen2Tokenizer
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        kind = AutoTokenizer if (folder / "config.json").is_file() else Qwen2Tokenizer
        made = kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False, use_fast=True)
        tokenizer = made.backend_tokenizer
        content = str(tokenizer.to_str()).encode()
    except Exception as error:  # transformers has no error class of its own
        raise _no_conversion(folder, " ".join(str(error).split())) from error
    finally:
        logging.set_verbosity(verbosity)
    for token, stated in _added_tokens(folder).items():
        found = tokenizer.token_to_id(token)
        if found != stated:  # the conversion numbers added tokens on, whatever their ids are
            raise _no_conversion(folder, f"the id of {token!r} becomes {found} where {stated} is stated")
    return content


def _added_tokens(folder: Path) -> dict[str, int]:
    """Ids of added tokens as the checkpoint states them; what is no token with an id is left out."""
    settings, added = (_object(folder / name) for name in _ADDED)
    decoder = settings.get("added_tokens_decoder")
    stated = {token: value for token, value in added.items() if type(value) is int and text_of(token)}
    for token_id, token in decoder.items() if isinstance(decoder, dict) else ():
        text = text_of(token)
        if text is not None and token_id.isdecimal():
            stated[text] = int(token_id)
    return stated


def _object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return {}  # ``text_files`` tells what is wrong with the file
    return content if isinstance(content, dict) else {}


def _no_conversion(folder: Path, reason: str) -> QconvertError:
    return QconvertError(
        f"no tokenizer.json can be made of {' and '.join(FROM_THESE)}: {reason}",
        where=folder / FROM_THESE[0],
        hint="download both again, or copy tokenizer.json from the model that this one was trained from",
    )
