"""Whether an answer is the expected one: pure functions over two texts."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from typing import Literal

Match = Literal["exact", "contains", "regex"]


def is_exact(answer: str, expected: str) -> bool:
    """Whether both are the same text, but for case and for blanks around and between words."""
    return _plain(answer) == _plain(expected)


def contains(answer: str, expected: str) -> bool:
    """Whether the expected text stands in the answer as words of its own, case and blanks aside.

    "4" does not stand in "14", "4.5" or "4,000", nor "art" in "party". Scripts without spaces between words
    have no such borders: there it may stand anywhere.
    """
    text, wanted = _plain(answer), _plain(expected)
    start = text.find(wanted)
    while start >= 0:
        end = start + len(wanted)
        if not (_joins(text, start) or _joins(text, end)):
            return True
        start = text.find(wanted, start + 1)
    return False


def fits(answer: str, expression: str) -> bool:
    """Whether a regular expression of Python's matches anywhere in the answer."""
    return re.search(expression, answer) is not None


MATCHES: Mapping[Match, Callable[[str, str], bool]] = {
    "exact": is_exact,
    "contains": contains,
    "regex": fits,
}


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _joins(text: str, place: int) -> bool:
    """Whether the letters on both sides of a place belong to one word or one number."""
    if place in (0, len(text)):
        return False
    before, after = text[place - 1], text[place]
    if before.isdigit() or after.isdigit():
        return _in_number(text, place)
    # Letters with a case, and letters of scripts that write words apart but have no case: not ideographs.
    return _is_of_word(before) and _is_of_word(after)


def _in_number(text: str, place: int) -> bool:
    before, after = text[place - 1], text[place]
    if before.isdigit() and after.isdigit():
        return True
    if before.isdigit() and after in ".,":  # 4.5 and 4,000, but not a full stop or a comma
        return text[place + 1 : place + 2].isdigit()
    if after.isdigit() and before in ".,":
        return text[place - 2 : place - 1].isdigit()
    return False


def _is_of_word(letter: str) -> bool:
    return letter.isalpha() and not (unicodedata.category(letter) == "Lo" and ord(letter) >= 0x0E00)
