"""What has been done already: one JSON file per environment, conversion and measurement.

A record belongs to its key (peer, variant, shape, round, settings). The same key is never worked on
twice; another setting is another key, so results of different settings never mix.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

Key = dict[str, Any]
Result = dict[str, Any]


class StepFailedError(RuntimeError):
    """A step that could not be done, and why, in a line or a few."""


def file_name(kind: str, key: Key) -> str:
    """``measurement-llama_cpp-Q4_0-0.5b-1-4f2a90c1d2.json``: readable, and another one for any other key."""
    text = json.dumps(key, sort_keys=True)
    return f"{_readable(kind, key)}-{hashlib.sha256(text.encode()).hexdigest()[:10]}.json"


def _readable(kind: str, key: Key) -> str:
    words = [str(key[part]) for part in ("peer", "variant", "shape", "round", "text") if part in key]
    return re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join([kind, *words]))


class Records:
    """The folder with the records.

    Attributes:
        retry_failed: work again on what failed before; otherwise a failure stands, with its reason.
    """

    def __init__(self, folder: Path, *, retry_failed: bool = False) -> None:
        self.folder = folder
        self.retry_failed = retry_failed
        self._failed_now: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True)

    def read(self, kind: str, key: Key) -> Result | None:
        """The record, or None where there is none (or one that a broken write left)."""
        try:
            record: Result = json.loads((self.folder / file_name(kind, key)).read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return record if record.get("key") == key else None

    def forget(self, kind: str, key: Key) -> None:
        """Remove the records that differ from this key in what their names do not tell, and this one."""
        for path in self.folder.glob(f"{_readable(kind, key)}-{'[0-9a-f]' * 10}.json"):
            path.unlink()

    def once(self, kind: str, key: Key, work: Callable[[], Result]) -> Result:
        """The record of this key, made by ``work`` if there is none; a failed step's holds ``failed``."""
        found = self.read(kind, key)
        name = file_name(kind, key)
        if found is not None and not (
            "failed" in found and self.retry_failed and name not in self._failed_now
        ):
            return found
        head = {
            "kind": kind,
            "key": key,
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "load_average": round(os.getloadavg()[0], 2),
        }
        try:
            record = {**head, **work()}
        except StepFailedError as error:
            record = {**head, "failed": str(error)}
            self._failed_now.add(name)
        path = self.folder / name
        draft = path.with_suffix(".part")
        draft.write_text(json.dumps(record, indent=2) + "\n")
        draft.replace(path)
        return record
