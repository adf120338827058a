"""The fields of a quantization_config, each with its meaning; what is not understood is refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qconvert.errors import QconvertError

ORIGINAL = "give the original checkpoint: qconvert quantises its weights itself (--precision)"


@dataclass(frozen=True)
class Field:
    """One field with its value (JSON-ready) and what it means."""

    key: str
    value: Any
    meaning: str


class Fields:
    """The fields that are left to be read of one JSON object.

    Args:
        raw: the object.
        where: file and key, for messages.
        method: how the weights are quantised, for messages.
    """

    def __init__(self, raw: Mapping[str, Any], where: str, method: str) -> None:
        self._left = dict(raw)
        self._where = where
        self._method = method
        self.told: list[Field] = []

    def take(
        self,
        key: str,
        usual: Any,
        fits: Callable[[Any], bool],
        wanted: str,
        meaning: str | Callable[[Any], str] = "",
    ) -> Any:
        """The value of a field.

        Args:
            key: its name.
            usual: what it is where it is not there, or null.
            fits: whether a value is understood.
            wanted: which values are, for the message.
            meaning: of the value, for people.

        Raises:
            QconvertError: another value.
        """
        value = self._left.pop(key, None)
        value = usual if value is None else value
        try:
            understood = fits(value)
        except TypeError:  # such as a list among names
            understood = False
        if not understood:
            raise self.refusal(key, value, wanted)
        self.told.append(Field(key, value, meaning if isinstance(meaning, str) else meaning(value)))
        return value

    def refusal(self, key: str, value: object, wanted: str) -> QconvertError:
        """The error of a field that is not covered."""
        return QconvertError(
            f"{self._method} with {key} = {value!r} is not supported: {wanted}.",
            where=f"{self._where}, {key}",
            hint=ORIGINAL,
        )

    def pass_over(self, *keys: str) -> None:
        """Fields that say how the weights were found, and nothing of what they are."""
        for key in keys:
            self._left.pop(key, None)

    def finish(self) -> tuple[Field, ...]:
        """All that was read.

        Raises:
            QconvertError: a field that nobody has asked for, and that says something.
        """
        for key, value in self._left.items():
            if value not in (None, False, {}, [], ""):
                raise self.refusal(key, value, "this field is not known, and could change the weights")
        return tuple(self.told)


def one_of(*values: Any) -> Callable[[Any], bool]:
    """Whether a value is one of these, and of the same type: true is not 1."""
    return lambda value: any(type(value) is type(known) and value == known for known in values)


def truth(value: Any) -> bool:
    """Whether it is true or false."""
    return type(value) is bool


def names(value: Any) -> bool:
    """Whether it is a list of names."""
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def names_or_expressions(value: Any) -> bool:
    """Whether it is a list of names, and of expressions that begin with ``re:``."""
    return names(value) and all(
        is_expression(name.removeprefix("re:")) for name in value if name.startswith("re:")
    )


def is_expression(text: Any) -> bool:
    """Whether it is a regular expression."""
    try:
        re.compile(text)
    except (re.error, TypeError, RecursionError, OverflowError):
        return False
    return True


def is_tile(value: Any) -> bool:
    """Whether it is a list of two positive whole numbers."""
    return (
        isinstance(value, list) and len(value) == 2 and all(type(each) is int and each > 0 for each in value)
    )
