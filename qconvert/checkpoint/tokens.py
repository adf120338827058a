"""Which tokens end an answer: those of config.json, generation_config.json and the tokenizer together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qconvert.checkpoint.tokenizer import read_tokenizer
from qconvert.errors import QconvertError
from qrun.text.tokenizer import read_special_tokens


@dataclass(frozen=True)
class EndTokens:
    """Token ids with the files that name each of them, in the order in which they were found; and notes."""

    sources: dict[int, tuple[str, ...]]
    notes: tuple[str, ...]

    @property
    def ids(self) -> list[int]:
        return list(self.sources)


def end_tokens(
    folder: Path, config: Any, generation_config: Mapping[str, Any] | None, vocab_size: int
) -> EndTokens:
    """The union of the three. Fine-tuning a base model often changes only the tokenizer's end token.

    Raises:
        QconvertError: a value that is no token id.
    """
    named = {
        "generation_config.json": (generation_config or {}).get("eos_token_id"),
        "config.json": config.eos_token_id,
        "the tokenizer": _of_tokenizer(folder),
    }
    sources: dict[int, tuple[str, ...]] = {}
    notes = []
    for file, value in named.items():
        for token in named_tokens(value, folder / file):
            if 0 <= token < vocab_size:
                sources[token] = (*sources.get(token, ()), file)
            else:
                notes.append(f"eos_token_id {token} of {file} is ignored: the model has no such token")
    return EndTokens(sources, tuple(notes))


def _of_tokenizer(folder: Path) -> int | None:
    tokenizer = read_tokenizer(folder)
    text = read_special_tokens(folder).get("eos_token")
    return None if tokenizer is None or text is None else tokenizer.token_to_id(text)


def named_tokens(value: object, where: Path) -> list[int]:
    """What stands under ``eos_token_id`` as a list; ids that no model has are among them.

    Raises:
        QconvertError: something that is no token id.
    """
    found = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int for token in found):
        raise QconvertError(
            f"eos_token_id must be a token id or a list of them, not {value!r}",
            where=f"{where}, eos_token_id",
            hint="write the id as a number, or leave it out",
        )
    return list(dict.fromkeys(found))
