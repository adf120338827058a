"""Text to token ids and back, through the checkpoint's own tokenizer.json."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tokenizers

from qrun.errors import QrunError
from qrun.text.added_tokens import add_tokens, special_names

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def _byte_letters() -> dict[str, int]:
    """The letters in which a byte-level vocabulary spells bytes (Radford et al. 2019, GPT-2's encoder.py)."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in own]
    letters = {chr(byte): byte for byte in own}
    return letters | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTES = _byte_letters()


class Tokenizer:
    """The tokenizer of a model folder.

    Attributes:
        special_tokens: named special tokens and their text, such as ``{"eos_token": "<|im_end|>"}``.
        special_ids: ids that ``decode`` leaves out by default.
        special_texts: what these tokens look like.
    """

    def __init__(self, backend: tokenizers.Tokenizer, special_tokens: Mapping[str, str]) -> None:
        # A tokenizer.json may have padding and truncation from its training; a prompt must have neither.
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self.special_tokens = MappingProxyType(dict(special_tokens))
        special = {key: token for key, token in backend.get_added_tokens_decoder().items() if token.special}
        self.special_ids = frozenset(special)
        self.special_texts = frozenset(token.content for token in special.values())
        self._specials = special
        self._literal_backend: tokenizers.Tokenizer | None = None

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Read ``tokenizer.json``, and more tokens and special tokens' names from ``tokenizer_config.json``.

        Raises:
            QrunError: tokenizer.json is missing or malformed.
        """
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise QrunError(
                "the folder has no tokenizer.json",
                where=path,
                hint="copy it from the checkpoint, or export the checkpoint again",
            )
        try:
            backend = tokenizers.Tokenizer.from_buffer(path.read_bytes().removeprefix(codecs.BOM_UTF8))
        except Exception as error:  # the library raises a bare Exception for whatever is wrong with the file
            raise QrunError(
                f"tokenizer.json cannot be read: {error}",
                where=path,
                hint="copy it from the checkpoint again; it may be truncated, or a Git LFS pointer",
            ) from error
        return cls(backend, add_folders_tokens(backend, Path(folder)))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; the model's logits are often padded beyond it."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def id_limit(self) -> int:
        """One more than the highest token id; ids may have gaps."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def texts(self) -> dict[int, str]:
        """Every token by its id, added ones included, as the vocabulary spells it."""
        return {key: text for text, key in self._backend.get_vocab(with_added_tokens=True).items()}

    def to_json(self) -> str:
        """What tokenizer.json holds, for other libraries."""
        return self._backend.to_str()

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of ``text``; special tokens written out in it become their ids.

        Args:
            text: any text.
            add_special_tokens: also what tokenizer.json puts around a plain prompt. For a prompt that a
                chat template rendered leave it off: the template has written them.

        Raises:
            QrunError: the text holds half of a surrogate pair, so it is not Unicode text.
        """
        return _encode(self._backend, text, add_special_tokens)

    def encode_literally(
        self, text: str, unmask: Callable[[str], str], add_special_tokens: bool = False
    ) -> list[int]:
        """Token ids of ``text``, in which special tokens that ``unmask`` brings are encoded as letters.

        Args:
            text: with masks in it, see ``Literal``.
            unmask: gives a piece of it without its masks.
            add_special_tokens: see ``encode``.

        Raises:
            QrunError: see ``encode``.
        """
        if self._literal_backend is None:  # made on demand: it takes a second for a large vocabulary
            self._literal_backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
            self._literal_backend.encode_special_tokens = True
        backend = self._literal_backend
        ids: list[int] = []
        end = 0
        for found in self._own_specials().finditer(text):
            ids += _encode(backend, unmask(text[end : found.start()]))
            ids.append(int(str(found.lastgroup)[1:]))
            end = found.end()
        ids += _encode(backend, unmask(text[end:]))
        if not add_special_tokens:
            return ids
        alone, whole = self.encode("a"), self.encode("a", add_special_tokens=True)
        before = next(place for place in range(len(whole)) if whole[place : place + len(alone)] == alone)
        return whole[:before] + ids + whole[before + len(alone) :]

    def _own_specials(self) -> re.Pattern[str]:
        """Matches special tokens, each as a group "t{id}", with blanks where a token takes them with it."""
        longest_first = sorted(self._specials.items(), key=lambda entry: len(entry[1].content), reverse=True)
        parts = [
            f"(?P<t{key}>"
            + (r"\s*" if token.lstrip else "")
            + re.escape(token.content)
            + (r"\s*" if token.rstrip else "")
            + ")"
            for key, token in longest_first
        ]
        return re.compile("|".join(parts) or r"(?!)")

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of ``token_ids``; half a character becomes U+FFFD, an unknown id nothing."""
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it (bytes as letters), None if there is no such id."""
        return self._backend.id_to_token(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token's text, which may be part of a character only."""
        text = self.decode([token_id], skip_special_tokens=False)
        spelled = self.token(token_id)
        if _REPLACEMENT not in text or spelled is None or not all(map(_BYTES.__contains__, spelled)):
            return text.encode()
        return bytes(_BYTES[letter] for letter in spelled)

    def token_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it, None if there is no such token."""
        return self._backend.token_to_id(token)

    def special_id(self, name: str) -> int | None:
        """The id behind a name such as "eos_token", None if the model has none."""
        text = self.special_tokens.get(name)
        return None if text is None else self.token_id(text)


def _encode(backend: tokenizers.Tokenizer, text: str, add_special_tokens: bool = False) -> list[int]:
    """Token ids of a text.

    Raises:
        QrunError: it holds half of a surrogate pair, which tokenizers refuses with an error of its own.
    """
    try:
        return list(backend.encode(text, add_special_tokens=add_special_tokens).ids)
    except TypeError:
        place = next((i for i, letter in enumerate(text) if 0xD800 <= ord(letter) <= 0xDFFF), None)
        if place is None:
            raise
        raise QrunError(
            f"the text is not Unicode: half a character (U+{ord(text[place]):04X}) at index {place}",
            hint="it was probably not UTF-8; check the file's or the terminal's encoding",
        ) from None


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """``tokenizer_config.json``, empty if there is none.

    Raises:
        QrunError: the file is not a JSON object.
    """
    return read_json_object(folder / "tokenizer_config.json")


def read_special_tokens(folder: Path) -> dict[str, str]:
    """Named special tokens and their text, as transformers' ``special_tokens_map`` has them.

    Raises:
        QrunError: the file is not a JSON object.
    """
    return special_names(_with_older_names(folder))


def add_folders_tokens(backend: tokenizers.Tokenizer, folder: Path) -> dict[str, str]:
    """Give a tokenizer the tokens that other files than its tokenizer.json define.

    Returns:
        As ``read_special_tokens``.

    Raises:
        QrunError: a file of the folder is not what it should be.
    """
    config = _with_older_names(folder)
    add_tokens(
        backend, config, read_json_object(folder / "added_tokens.json"), folder / "tokenizer_config.json"
    )
    return special_names(config)


def _with_older_names(folder: Path) -> dict[str, Any]:
    """``tokenizer_config.json``, and special_tokens_map.json's names where transformers reads that file."""
    config = read_tokenizer_config(folder)
    if "added_tokens_decoder" not in config:
        config |= read_json_object(folder / "special_tokens_map.json")
    return config


def read_json_object(path: Path) -> dict[str, Any]:
    """One of the folder's small JSON files, empty if there is none.

    Raises:
        QrunError: it cannot be read, or is not a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:  # unreadable, not JSON, or not UTF-8
        raise QrunError(
            f"{path.name} is not JSON: {error}", where=path, hint="copy it from the checkpoint"
        ) from error
    if not isinstance(content, dict):
        raise QrunError(
            f"{path.name} must hold a JSON object", where=path, hint="copy it from the checkpoint"
        )
    return content
