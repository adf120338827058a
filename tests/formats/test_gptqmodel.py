"""If this fails, we read GPTQ's codes otherwise than GPTQModel writes and reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.formats.making import Packed, gptq_config, of_gptqmodel
from tests.formats.reading import same_as_the_library
from tests.qconvert.quantising import order_of_inputs

KINDS: dict[str, dict[str, Any]] = {
    "4 bits, symmetric": {"bits": 4, "symmetric": True},
    "4 bits": {"bits": 4, "symmetric": False},
    "8 bits": {"bits": 8, "symmetric": False},
    "an order of inputs": {"bits": 4, "symmetric": False, "ordered": True},
    "an order of inputs, 4 bits, symmetric": {"bits": 4, "symmetric": True, "ordered": True},
    "an order of inputs, 8 bits, symmetric": {"bits": 8, "symmetric": True, "ordered": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_gptqmodel_packs_we_read(tmp_path: Path, kind: str) -> None:
    settings = {"ordered": False, **KINDS[kind]}
    bits, symmetric, group = settings["bits"], settings["symmetric"], 32

    def pack(_: str, weight: torch.Tensor) -> Packed:
        groups = order_of_inputs(3, weight.shape[1], group) if settings["ordered"] else None
        return of_gptqmodel(weight, bits, group, symmetric=symmetric, groups=groups)

    config = gptq_config(bits, group, symmetric=symmetric, ordered=settings["ordered"])
    same_as_the_library(tmp_path / "model", config, pack, "float16")
