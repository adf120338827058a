"""One of our own JSON files, read key by key: an error names the key that is missing or mistyped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar, cast

from qrun.errors import QrunError, as_refusal

T = TypeVar("T")
_UPDATE = "update it: pip install -U qconvert"


class JsonReader:
    """Reads dotted keys out of a JSON object.

    Args:
        file: where it came from, for messages.
        raw: the object.
        title: what the file is, for messages: "the manifest".
        remake: how to get a good one: "export the model again".
    """

    def __init__(self, file: Path, raw: Mapping[str, Any], *, title: str, remake: str) -> None:
        self.file = file
        self.raw = raw
        self.title = title
        self.remake = remake

    @classmethod
    def open(cls, file: Path, *, title: str, remake: str, file_format: str, version: int) -> JsonReader:
        """Read a file that names its own format and version.

        Raises:
            QrunError: it cannot be read, is not JSON, of another ``format`` or a newer ``format_version``.
        """
        try:
            raw = json.loads(file.read_text(encoding="utf-8-sig"))
        except PermissionError as error:
            raise cast(QrunError, as_refusal(error)) from error
        except (OSError, ValueError, RecursionError) as error:
            raise QrunError(f"{title} cannot be read: {error}", where=file, hint=remake) from error
        if not isinstance(raw, dict) or raw.get("format") != file_format:
            raise QrunError(f'{title} is not ours: "format" is not "{file_format}"', where=file, hint=remake)
        reader = cls(file, raw, title=title, remake=remake)
        found = reader.get("format_version", int)
        if found > version:
            raise QrunError(
                f"{title} has format version {found}; this qrun reads up to {version}",
                where=file,
                hint=_UPDATE,
            )
        return reader

    def get(self, key: str, kind: type[T]) -> T:
        """The value behind a dotted key, which must be of the type ``kind`` (a bool is no int)."""
        value: Any = self.raw
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            found = "is missing" if value is None else f"is {value!r}, not of type {kind.__name__}"
            raise self.refusal(f'"{key}" {found}')
        return value

    def one_of(self, key: str, known: tuple[str, ...]) -> str:
        value = self.get(key, str)
        if value not in known:
            raise QrunError(
                f'{self.title}\'s "{key}" is {value!r}, not one of {", ".join(known)}',
                where=self.file,
                hint=f"{_UPDATE}; or {self.remake}",
            )
        return value

    def positive(self, key: str) -> int:
        value = self.get(key, int)
        if value <= 0:
            raise self.refusal(f'"{key}" is {value}, not a positive number')
        return value

    def objects(self, key: str) -> list[JsonReader]:
        """A list of JSON objects, each with a reader of its own."""
        return [
            JsonReader(
                self.file, item if isinstance(item, dict) else {}, title=self.title, remake=self.remake
            )
            for item in self.get(key, list)
        ]

    def strings(self, key: str) -> tuple[str, ...]:
        value = self.get(key, list)
        if not all(isinstance(item, str) for item in value):
            raise self.refusal(f'"{key}" is {value!r}, not a list of strings')
        return tuple(value)

    def string_map(self, key: str) -> dict[str, str]:
        value = self.get(key, dict)
        if not all(isinstance(item, str) for item in value.values()):
            raise self.refusal(f'"{key}" holds something that is not a string')
        return dict(value)

    def path(self, key: str, *, folder: str) -> str:
        """A relative path that stays inside the folder of the file; ``folder`` says which, for messages."""
        name = self.get(key, str)
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or not path.parts:
            raise QrunError(
                f"{self.title} names a path outside {folder}: {name!r}",
                where=self.file,
                hint="do not use this folder: it was not written by qconvert",
            )
        return name

    def refusal(self, what: str) -> QrunError:
        """The error of a value that cannot be used; ``what`` begins with the key."""
        return QrunError(f"{self.title}'s {what}", where=self.file, hint=self.remake)
