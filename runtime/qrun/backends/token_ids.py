"""Token ids, checked before they go into any graph: one out of range would read memory outside a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import SupportsIndex

import numpy as np
from numpy.typing import NDArray

from qrun.errors import QrunError

# Python gives out whole numbers of these too: the bytes of a text that was not decoded, say.
_NOT_IDS = (bytes, bytearray, memoryview, set, frozenset, Mapping)


def as_token_ids(prompt: Iterable[object]) -> list[int]:
    """A prompt's token ids as whole numbers, from a list, an array, a tensor or whatever else has them.

    Raises:
        QrunError: there is something else in it; fractions and truth values are not token ids.
    """
    try:
        if isinstance(prompt, _NOT_IDS):
            raise TypeError(f"a {type(prompt).__name__} holds no token ids in an order")
        given = prompt.tolist() if hasattr(prompt, "tolist") else list(prompt)
        ids = [_whole(each) for each in given]
    except TypeError as error:
        shown = repr(prompt) if len(repr(prompt)) < 60 else f"a {type(prompt).__name__}"
        raise QrunError(
            f"a prompt is text or a list of token ids, which are whole numbers, not {shown}",
            hint="encode the text with the model's tokenizer, or give the text itself",
        ) from error
    return ids


def _whole(value: object) -> int:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, SupportsIndex):
        raise TypeError(f"{value!r} is no token id")
    number = value.__index__()
    if number.bit_length() > 63:
        raise TypeError("no vocabulary has so many tokens")
    return number


def check_token_ids(token_ids: NDArray[np.int64], vocab_size: int) -> None:
    """Refuse what the embedding has no row for.

    Raises:
        QrunError: no token ids at all, or one outside the vocabulary.
    """
    hint = "encode the text with the tokenizer of the same model folder"
    if token_ids.size == 0:
        raise QrunError("no token ids were given", hint=hint)
    for token_id in (int(token_ids.min()), int(token_ids.max())):
        if not 0 <= token_id < vocab_size:
            raise QrunError(f"token id {token_id} is outside the vocabulary of {vocab_size:,}", hint=hint)
