"""Tiny checkpoints in floats of 8 bits, written apart from what reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.qconvert.quantising import SIZES, rewrite
from tests.tiny import make_tiny_checkpoint


def make_float8(
    folder: Path,
    *,
    tile: tuple[int, int] | None = (32, 32),
    method: str = "fp8",
    settings: dict[str, Any] | None = None,
    **overrides: Any,
) -> dict[str, torch.Tensor]:
    """Floats of 8 bits; returns what the matrices stand for. ``tile`` (1, 0): a scale for each output."""
    make_tiny_checkpoint(folder, dtype="bfloat16", **{**SIZES, **overrides})
    floats: dict[str, torch.Tensor] = {}
    inverse = method == "fp8"

    def change(base: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        rows, columns = weight.shape
        high, wide = tile or (rows, columns)
        high, wide = min(high, rows), wide or columns
        scales = torch.empty(-(-rows // high), -(-columns // wide))
        codes, due = torch.empty(rows, columns, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
        for row in range(0, rows, high):
            for column in range(0, columns, wide):
                part = (slice(row, row + high), slice(column, column + wide))
                scale = weight[part].float().abs().max() / 448
                scales[row // high, column // wide] = scale
                codes[part] = (weight[part].float() / scale).to(torch.float8_e4m3fn)
                due[part] = codes[part].float() * scale
        floats[f"{base}.weight"] = due
        name = "weight_scale_inv" if inverse else "weight_scale"
        return {f"{base}.weight": codes, f"{base}.{name}": scales.squeeze() if tile is None else scales}

    of_tiles = None if tile is None or not tile[1] else list(tile)
    config = {
        "quant_method": method,
        **({"weight_block_size": of_tiles, "fmt": "e4m3"} if inverse else {}),
        "activation_scheme": "dynamic",
        "modules_to_not_convert": None,
        **(settings or {}),
    }
    rewrite(folder, config, change)
    return floats
