"""Tokens that other files than tokenizer.json define: transformers adds them when it reads a folder.

A token that the tokenizer has already stays as it is; a new one gets the next free id, whatever number the
file gives it.

Source: ``TokenizersBackend.__init__`` and ``_from_pretrained`` in transformers (5.23).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from qrun.errors import QrunError

# The named special tokens that transformers gives to a chat template.
SPECIAL_TOKEN_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
_MORE_SPECIAL = ("additional_special_tokens", "extra_special_tokens")


def add_tokens(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], older: Mapping[str, Any], where: Path
) -> None:
    """Give a tokenizer the tokens that tokenizer_config.json names.

    Args:
        backend: what tokenizer.json holds.
        config: tokenizer_config.json.
        older: added_tokens.json, ids by text, which counts where the other has no ``added_tokens_decoder``.
        where: tokenizer_config.json, for messages.

    Raises:
        QrunError: ``added_tokens_decoder`` is no table of tokens by id.
    """
    special = dict(_special(config))
    listed = config.get("added_tokens_decoder")
    if listed is None:
        found = [
            (number, text) for text, number in older.items() if type(number) is int and _is_unicode(text)
        ]
        tokens = [_token(text, special=text in special) for _, text in sorted(found)]
    else:
        tokens = [token for _, token in sorted(_decoder(listed, where), key=lambda entry: entry[0])]
    for token in tokens:
        token.special = token.special or token.content in special
    present = {token.content for token in tokens}
    tokens += [token for text, token in special.items() if text not in present]
    backend.add_tokens([token for token in tokens if token.content])


def special_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Named special tokens and their text; a checkpoint may have names of its own ("image_token")."""
    named = {name: config.get(name) for name in SPECIAL_TOKEN_NAMES}
    more = config.get("extra_special_tokens")
    named |= more if isinstance(more, dict) else {}
    texts = {name: text_of(token) for name, token in named.items()}
    return {name: text for name, text in texts.items() if text is not None}


def text_of(token: object) -> str | None:
    """A special token is written as its text, or as an object with a "content"."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) and _is_unicode(found) else None


def _is_unicode(text: str) -> bool:
    """Whether a text is free of surrogates: JSON can write half a pair, which no tokenizer takes."""
    return not any(0xD800 <= ord(letter) <= 0xDFFF for letter in text)


def _special(config: Mapping[str, Any]) -> Iterator[tuple[str, tokenizers.AddedToken]]:
    written = [config.get(name) for name in SPECIAL_TOKEN_NAMES]
    for name in _MORE_SPECIAL:
        more = config.get(name)
        written += list(more.values()) if isinstance(more, dict) else more if isinstance(more, list) else []
    for each in written:
        text = text_of(each)
        if text is not None:
            yield text, _token(text, special=True, flags=each if isinstance(each, dict) else {})


def _decoder(listed: object, where: Path) -> Iterator[tuple[int, tokenizers.AddedToken]]:
    if not isinstance(listed, dict):
        raise _refusal(f"is {listed!r}", where)
    for number, entry in listed.items():
        text = text_of(entry) if isinstance(entry, dict) else None
        if text is None or not number.isdecimal():
            raise _refusal(f"has the entry {number!r}: {entry!r}", where)
        yield int(number), _token(text, special=entry.get("special") is True, flags=entry)


def _token(text: str, *, special: bool, flags: Mapping[str, Any] | None = None) -> tokenizers.AddedToken:
    # By default a special token is looked for in the text as it is, others in the normalised one.
    chosen = (
        {name: flags[name] for name in _FLAGS if isinstance((flags or {}).get(name), bool)} if flags else {}
    )
    return tokenizers.AddedToken(text, special=special, **({"normalized": not special} | chosen))


def _refusal(what: str, where: Path) -> QrunError:
    return QrunError(
        f'"added_tokens_decoder" {what}: it must be a table of tokens by their ids',
        where=where,
        hint="copy the file from the checkpoint again",
    )
