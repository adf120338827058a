"""What the libraries have packed, as we read it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qconvert.checkpoint.load import load_model, open_checkpoint
from qconvert.checkpoint.weights import CheckpointWeights
from tests.formats.making import Packed
from tests.qconvert.quantising import SIZES, rewrite
from tests.tiny import make_tiny_checkpoint


def same_as_the_library(
    folder: Path, config: dict[str, Any], pack: Callable[[str, torch.Tensor], Packed], dtype: str
) -> None:
    """A tiny checkpoint is packed matrix by matrix, and read as the library reads it, to the last bit."""
    make_tiny_checkpoint(folder, dtype=dtype, **SIZES)
    due: dict[str, torch.Tensor] = {}

    def change(base: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        tensors, floats = pack(base, weight)
        due[f"{base}.weight"] = floats()
        return {f"{base}.{end}": tensor for end, tensor in tensors.items()}

    rewrite(folder, config, change)
    read = CheckpointWeights(load_model(open_checkpoint(folder)))
    assert due
    for name, tensor in due.items():
        assert torch.equal(read[name], tensor), name
