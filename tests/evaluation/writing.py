"""Data files of a few lines."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TASK = {"prompt": "What is the capital of Italy?", "expected": "Rome"}


def data(path: Path, *lines: Mapping[str, Any] | str | bytes) -> Path:
    """A file of these lines: objects as JSON, others as they stand."""
    with path.open("wb") as file:
        for line in lines:
            text = json.dumps(line) if isinstance(line, Mapping) else line
            file.write((text if isinstance(text, bytes) else text.encode()) + b"\n")
    return path
