"""Keeps what a user types as text: a special token that is written out in it is encoded as its letters.

Special tokens are masked in the messages before the template is rendered, so that only the template's own are
left. The rendering is cut at these, and the pieces between them are encoded with the masks taken off.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from qrun.text.chat_template import too_deep
from qrun.text.tokenizer import Tokenizer

# A character of Unicode's private use area, which no template holds; in a message it is masked as well.
_MARK = "\uf8f0"


class Literal:
    """Messages and prompts in which special tokens are text.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # The longer first, where one begins with another.
        self._masked = [_MARK, *sorted(tokenizer.special_texts, key=len, reverse=True)]
        self._typed = re.compile("|".join(map(re.escape, self._masked)))

    def mask(self, text: str) -> str:
        """The text with a mark and a number in place of each special token."""
        return self._typed.sub(lambda found: f"{_MARK}{self._masked.index(found[0])}{_MARK}", text)

    def mask_all(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Messages with their texts masked, those of nested parts too; roles stay.

        Raises:
            QrunError: lists and objects within each other without end.
        """
        return [
            {key: value if key == "role" else self._masked_parts(value) for key, value in message.items()}
            for message in messages
        ]

    def mask_tools(self, tools: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Tools with their texts masked: a description may come from anywhere.

        Raises:
            QrunError: see ``mask_all``.
        """
        return [self._masked_parts(tool) for tool in tools]

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a rendering of masked messages.

        Args:
            text: with masks; special tokens that are not masked are the template's own.
            add_special_tokens: see ``Tokenizer.encode``.
        """
        if _MARK not in text:
            return self._tokenizer.encode(text, add_special_tokens)
        return self._tokenizer.encode_literally(text, self._unmask, add_special_tokens)

    def _unmask(self, text: str) -> str:
        return re.sub(f"{_MARK}([0-9]+){_MARK}", lambda found: self._masked[int(found[1])], text)

    def _masked_parts(self, value: Any) -> Any:
        try:
            return self._mask_inside(value)
        except RecursionError:
            raise too_deep() from None

    def _mask_inside(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.mask(value)
        if isinstance(value, Mapping):
            return {self._mask_inside(key): self._mask_inside(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._mask_inside(item) for item in value]
        return value
