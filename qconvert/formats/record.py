"""What a calibration records in a model folder for whoever wants to check what it has determined.

``rounding.json`` has digests of the weights that were rounded on purpose, and of the scales of an int8 KV
cache: neither follows from the checkpoint alone. ``balance.safetensors`` has the factors that were folded
into matrices before (``folding.py``), by the name of the tensor whose rows they divide.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qconvert.errors import QconvertError

if TYPE_CHECKING:
    import torch

RECORD_NAME = "rounding.json"
FACTORS_NAME = "balance.safetensors"


class Digest:
    """SHA-256 of a tensor's float32 values, row after row."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, rows: torch.Tensor) -> None:
        self._hash.update(rows.contiguous().numpy().data)

    @property
    def text(self) -> str:
        return self._hash.hexdigest()


def digest_of(rows: torch.Tensor) -> str:
    """The digest of a tensor in one piece."""
    digest = Digest()
    digest.add(rows)
    return digest.text


def add_to_record(folder: Path, digests: Mapping[str, str]) -> None:
    """Write digests into a model folder's ``rounding.json``, beside those that it has."""
    if digests:
        text = json.dumps({"float32_sha256": {**read_record(folder), **digests}}, indent=1)
        (folder / RECORD_NAME).write_text(f"{text}\n", encoding="utf-8")


def read_record(folder: Path) -> dict[str, str]:
    """The digests in a model folder's ``rounding.json``; none where no calibration has determined anything.

    Raises:
        QconvertError: the file is not what ``add_to_record`` writes.
    """
    file = folder / RECORD_NAME
    if not file.is_file():
        return {}
    try:
        digests = json.loads(file.read_text(encoding="utf-8"))["float32_sha256"]
        return {str(name): str(digest) for name, digest in digests.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise QconvertError(
            "the record of the calibration is damaged", where=file, hint="export again"
        ) from error


def read_factors(folder: Path) -> dict[str, torch.Tensor]:
    """Factors by the name of the tensor that they divide, in float32; none where nothing was folded.

    Raises:
        QconvertError: the file is not what ``calibration.calibrate`` writes.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / FACTORS_NAME
    if not file.is_file():
        return {}
    try:
        return {name: factor.float() for name, factor in load_file(file).items()}
    except (SafetensorError, ValueError) as error:
        raise QconvertError(
            "the record of folded factors is damaged", where=file, hint="export again"
        ) from error
