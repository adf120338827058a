"""``rounding.json`` in a model folder: digests of the weights that a calibration has rounded on purpose."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from qconvert.errors import QconvertError

if TYPE_CHECKING:
    import torch

RECORD_NAME = "rounding.json"


class Digest:
    """SHA-256 of a tensor's float32 values, row after row."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, rows: torch.Tensor) -> None:
        self._hash.update(rows.contiguous().numpy().tobytes())

    @property
    def text(self) -> str:
        return self._hash.hexdigest()


def read_record(folder: Path) -> dict[str, str]:
    """The digests in a model folder's ``rounding.json``; none where all weights are rounded to nearest.

    Raises:
        QconvertError: the file is not what ``write_record`` writes.
    """
    file = folder / RECORD_NAME
    if not file.is_file():
        return {}
    try:
        digests = json.loads(file.read_text(encoding="utf-8"))["float32_sha256"]
        return {str(name): str(digest) for name, digest in digests.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise QconvertError(
            "the record of rounded weights is damaged", where=file, hint="export again"
        ) from error
