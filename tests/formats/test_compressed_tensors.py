"""If one of these fails, we read compressed-tensors otherwise than the library that defines them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.formats.making import compressed_config, of_compressed_tensors
from tests.formats.reading import same_as_the_library

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "packed, 4 bits, symmetric": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
    "packed, 4 bits": (
        "pack-quantized",
        {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
    ),
    "packed, 8 bits": (
        "pack-quantized",
        {"num_bits": 8, "strategy": "group", "group_size": 64, "symmetric": False},
    ),
    "packed, channels": ("pack-quantized", {"num_bits": 4, "strategy": "channel"}),
    "integers of 8 bits": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "floats, channels": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "channel"},
    ),
    "floats, one scale": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "tensor"},
    ),
    "floats, tiles": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [64, 32]},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_library_compresses_we_read(tmp_path: Path, kind: str) -> None:
    form, settings = KINDS[kind]
    same_as_the_library(
        tmp_path / "model",
        compressed_config(form, settings),
        lambda _, weight: of_compressed_tensors(weight, form, settings),
        "float32",
    )
