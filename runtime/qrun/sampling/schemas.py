"""JSON schemas for llguidance: what it would not enforce is refused or rewritten, its messages shortened."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from qrun.errors import QrunError

_DATA = ("const", "enum", "default", "examples")  # hold values and no schemas
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # by a name
_UNENFORCED = ("contentEncoding", "contentMediaType", "contentSchema")
# Notes for people and programs, which say nothing of what fits; and the x- of whoever made the schema.
_NOTES = frozenset(
    (
        *("$schema", "$id", "id", "$anchor", "$comment", "title", "description", "default", "example"),
        *("examples", "deprecated", "readOnly", "writeOnly", "discriminator", "xml", "externalDocs"),
    )
)
_KNOWN = frozenset(
    (
        *("type", "enum", "const", "properties", "required", "additionalProperties"),
        *("patternProperties", "minProperties", "maxProperties", "items", "additionalItems"),
        *("prefixItems", "minItems", "maxItems", "minLength", "maxLength", "pattern", "format"),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "anyOf", "allOf"),
        *("oneOf", "$ref", "$defs", "definitions"),
    )
)
_UNIMPLEMENTED = re.compile(r"Unimplemented keys: \[(.*?)\]")
# Control characters that JSON can write only as \u escapes, which are not allowed (see ``constraint``).
_CONTROL = re.compile(r"[\x00-\x07\x0b\x0e-\x1f]")
_LONGEST = 300
_SHOWN = 3  # keywords that are named
# llguidance's own formats accept the 29th of February in every year, and a 61st second at any time.
_LEAP_YEAR = "([0-9]{2}(0[48]|[2468][048]|[13579][26])|([02468][048]|[13579][26])00)"
_DATE = (
    "([0-9]{4}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)"
    f"|02-(0[1-9]|1[0-9]|2[0-8]))|{_LEAP_YEAR}-02-29)"
)
_HOUR = "([01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_HOUR}:[0-5][0-9](\.[0-9]+)?(Z|[+-]{_HOUR})"
_FORMATS = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}T{_TIME}$"}


def with_exact_formats(schema: Any) -> Any:
    """A copy in which the formats of dates and times are patterns that only real dates and times match."""
    if isinstance(schema, list):
        return [with_exact_formats(each) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    found: dict[str, Any] = {}
    for name, value in schema.items():
        if name in _DATA:
            found[name] = value
        elif name in _NAMED and isinstance(value, Mapping):
            found[name] = {key: with_exact_formats(part) for key, part in value.items()}
        else:
            found[name] = with_exact_formats(value)
    pattern = _FORMATS.get(found["format"]) if isinstance(found.get("format"), str) else None
    others = found.get("allOf", [])
    if pattern is not None and isinstance(others, list):
        del found["format"]
        found["allOf"] = [*others, {"pattern": pattern}]
    return found


def refuse_unenforced(schema: Mapping[str, Any] | bool) -> None:
    """Refuse what llguidance accepts in a schema but does not enforce.

    Raises:
        QrunError: names the keyword.
    """
    for part in _parts(schema):
        for name in _UNENFORCED:
            if name in part:
                raise QrunError(f'schema cannot be enforced: "{name}"', hint="use pattern or format")
        least, required = part.get("minProperties", 0), part.get("required", [])
        # A key that the schema does not name could be written twice, and would then count as one property.
        if isinstance(least, int | float) and isinstance(required, list) and least > max(1, len(required)):
            raise QrunError(
                'schema cannot be enforced: "minProperties" above 1 and the number of required ones',
                hint="name the properties and list them in required",
            )
        named = part.get("properties")
        spelled = [part.get("const"), part.get("enum"), list(named) if isinstance(named, Mapping) else []]
        if _CONTROL.search("".join(_texts(spelled))):
            raise QrunError(
                "schema cannot be enforced: control characters in const, enum or properties",
                hint="only \\b, \\f, \\n, \\r and \\t are written",
            )
        unknown = sorted(name for name in part if name == "x-guidance" or not _is_known(name))
        if unknown:
            near = get_close_matches(unknown[0], _KNOWN, 1, 0.8)
            others = "leave that out; docs/serving.md lists what is enforced"
            names = ", ".join(f'"{name[:100]}"' for name in unknown[:_SHOWN])
            raise QrunError(
                f"schema cannot be enforced: {names}", hint=f"is {near[0]} meant?" if near else others
            )


def _is_known(name: str) -> bool:
    return name in _KNOWN or name in _NOTES or name.startswith("x-")


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
                elif name not in _DATA and name not in _NOTES and not name.startswith("x-"):
                    left.append(value)


def readable(message: str) -> str:
    """A message of llguidance, short and about the user's text alone."""
    if found := _UNIMPLEMENTED.search(message):
        return found[1]
    if "NoExtensionBias" in message:  # llguidance's word for a start from which no first character follows
        return "it leads to nothing but itself, so that no answer fits it"
    lines = [line.strip() for line in message.split("\n\nError context", maxsplit=1)[0].splitlines()]
    text = " ".join(line for line in lines if line and line != "<non-verbose/>")
    if text.startswith("oneOf constraints"):
        return '"oneOf" whose parts do not exclude each other; use anyOf'
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
