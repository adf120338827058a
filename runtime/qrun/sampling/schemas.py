"""What of a JSON schema llguidance would pass over, and its refusals in plain words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from qrun.errors import QrunError

_DATA = ("const", "enum", "default", "examples")  # hold values and no schemas
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # by a name
_UNENFORCED = ("contentEncoding", "contentMediaType", "contentSchema")
_UNIMPLEMENTED = re.compile(r"Unimplemented keys: \[(.*?)\]")
# Without \\u escapes, with which a key could hide from the schema, nothing can spell these.
_CONTROL = re.compile(r"[\x00-\x07\x0b\x0e-\x1f]")
_LONGEST = 300


def refuse_unenforced(schema: Mapping[str, Any] | bool) -> None:
    """Refuse what llguidance reads and does not keep to.

    Raises:
        QrunError: names the keyword.
    """
    for part in _parts(schema):
        for name in _UNENFORCED:
            if name in part:
                raise QrunError(f'schema cannot be enforced: "{name}"', hint="use pattern or format")
        least, required = part.get("minProperties", 0), part.get("required", [])
        # Keys that the schema does not name may come twice, and then count once.
        if isinstance(least, int | float) and isinstance(required, list) and least > max(1, len(required)):
            raise QrunError(
                'schema cannot be enforced: "minProperties" above 1 and the number of required ones',
                hint="name the properties and list them in required",
            )
        spelled = [part.get("const"), part.get("enum"), list(part.get("properties") or ())]
        if _CONTROL.search("".join(_texts(spelled))):
            raise QrunError(
                "schema cannot be enforced: control characters in const, enum or properties",
                hint="only \\b, \\f, \\n, \\r and \\t are written",
            )
        if "x-guidance" in part:
            raise QrunError('schema cannot be enforced: "x-guidance"', hint="leave it out")


def _texts(value: object) -> Iterator[str]:
    """All strings within some JSON."""
    left = [value]
    while left:
        found = left.pop()
        if isinstance(found, str):
            yield found
        elif isinstance(found, list):
            left += found
        elif isinstance(found, Mapping):
            left += [*found.keys(), *found.values()]


def _parts(schema: object) -> Iterator[Mapping[str, Any]]:
    """All schemas within one, also where nothing but a reference leads."""
    left = [schema]
    while left:
        found = left.pop()
        if isinstance(found, list):
            left += found
        elif isinstance(found, Mapping):
            yield found
            for name, value in found.items():
                if name in _NAMED and isinstance(value, Mapping):
                    left += value.values()
                elif name not in _DATA:
                    left.append(value)


def readable(message: str) -> str:
    """A message of llguidance, short and about the user's text alone."""
    if found := _UNIMPLEMENTED.search(message):
        return found[1]
    lines = [line.strip() for line in message.split("\n\nError context", maxsplit=1)[0].splitlines()]
    text = " ".join(line for line in lines if line and line != "<non-verbose/>")
    if text.startswith("oneOf constraints"):
        return '"oneOf" whose parts do not exclude each other; use anyOf'
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
