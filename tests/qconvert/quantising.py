"""Tiny checkpoints in other programs' formats, written slowly and plainly, apart from what reads them.

Every writer returns its matrices in codes, by their names as floats.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import make_tiny_checkpoint

AWQ_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight outputs lies in which four bits
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
Written = dict[str, "Rounded"]
LINEAR = re.compile(r"_proj\.weight$")
LINEAR_AND_HEAD = re.compile(r"(_proj|lm_head)\.weight$")


@dataclass
class Rounded:
    """Codes uint8 ``[N, K]``, scales and zero points ``[N, G]``, the group of every input ``[K]``."""

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    groups: np.ndarray

    @property
    def floats(self) -> torch.Tensor:
        codes, zeros = self.codes.astype(np.float32), self.zeros.astype(np.float32)[:, self.groups]
        return torch.from_numpy((codes - zeros) * self.scales.astype(np.float32)[:, self.groups])


def rounded(
    weight: torch.Tensor,
    bits: int,
    group: int,
    *,
    symmetric: bool = True,
    groups: np.ndarray | None = None,
    scale_type: type = np.float16,
) -> Rounded:
    """To nearest, group by group."""
    values = weight.float().numpy()
    rows, columns = values.shape
    length = columns if group == -1 else group
    groups = np.arange(columns) // length if groups is None else groups
    top, count = (1 << bits) - 1, -(-columns // length)
    scales, zeros = np.empty((rows, count), scale_type), np.empty((rows, count), np.int64)
    for index in range(count):
        part = values[:, groups == index]
        if symmetric:
            scales[:, index], zeros[:, index] = abs(part).max(1) / (top // 2), 1 << (bits - 1)
        else:
            low, high = part.min(1).clip(max=-1e-3), part.max(1).clip(min=1e-3)
            scales[:, index] = (high - low) / top
            zeros[:, index] = np.clip(np.rint(-low / scales[:, index]), 1, top)
    wide = scales.astype(np.float32)[:, groups]
    codes = np.clip(np.rint(values / wide) + zeros[:, groups], 0, top).astype(np.uint8)
    return Rounded(codes, scales, zeros, groups)


def words(fields: Iterable[int], bits: int) -> int:
    """Fields in one 32-bit word, the first in the lowest bits, as a signed number."""
    word = 0
    for place, field in enumerate(fields):
        word |= int(field) << (place * bits)
    return word - (1 << 32) if word >= 1 << 31 else word


def packed(matrix: np.ndarray, bits: int) -> torch.Tensor:
    """int32 ``[n, m bits / 32]`` of fields ``[n, m]``."""
    per_word = 32 // bits
    return torch.tensor(
        [[words(row[at : at + per_word], bits) for at in range(0, len(row), per_word)] for row in matrix],
        dtype=torch.int32,
    )


def gptq_tensors(found: Rounded, bits: int, *, version: int = 1) -> dict[str, torch.Tensor]:
    return {
        "qweight": packed(found.codes, bits).t().contiguous(),
        "qzeros": packed(found.zeros.T - (version == 1), bits),
        "scales": torch.from_numpy(found.scales.T.copy()),
        "g_idx": torch.from_numpy(found.groups.astype(np.int32)),
    }


def awq_tensors(found: Rounded) -> dict[str, torch.Tensor]:
    def in_places(matrix: np.ndarray) -> np.ndarray:
        eights = matrix.reshape(len(matrix), -1, 8)
        return eights[..., list(AWQ_PLACES)].reshape(len(matrix), -1)

    return {
        "qweight": packed(in_places(found.codes.T), 4),
        "qzeros": packed(in_places(found.zeros.T), 4),
        "scales": torch.from_numpy(found.scales.T.copy()),
    }


def rewrite(
    folder: Path,
    config: dict[str, Any] | None,
    change: Callable[[str, torch.Tensor], dict[str, torch.Tensor]],
    which: re.Pattern[str] = LINEAR,
) -> Path:
    """Put what ``change`` makes of each linear weight into its place; ``change`` gives whole names."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if which.search(name)]:
        tensors |= change(name.removesuffix(".weight"), tensors.pop(name))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if config is not None:
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**settings, "quantization_config": config}))
    return folder


def order_of_inputs(seed: int, columns: int, length: int) -> np.ndarray:
    """The group of each input for a random order."""
    groups = np.empty(columns, np.int64)
    groups[np.random.default_rng(seed).permutation(columns)] = np.arange(columns) // length
    return groups


def make_gptq(
    folder: Path,
    *,
    bits: int = 4,
    group: int = 32,
    symmetric: bool = True,
    desc_act: bool = False,
    version: int = 1,
    bias_of_zeros: bool = False,
    settings: dict[str, Any] | None = None,
    skip: str = " ",
    head: bool = False,
    own_orders: bool = False,
    others: tuple[str, int, int] = (" ", 0, 0),
    **overrides: Any,
) -> Written:
    """A GPTQ checkpoint; q, k and v have one order of inputs, gate and up another.

    ``others`` is an expression for modules with bits and groups of their own.
    """
    make_tiny_checkpoint(folder, dtype="float16", **{**SIZES, **overrides})
    written: Written = {}

    def change(base: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        if skip in base:
            return {f"{base}.weight": weight}
        columns = weight.shape[1]
        groups = None
        of_bits, of_group = others[1:] if re.match(others[0], base) else (bits, group)
        if desc_act:
            kind = base if own_orders else re.sub(r"[qkv]_proj|gate_proj|up_proj", "", base)
            seed = sum(map(ord, kind))
            groups = order_of_inputs(seed, columns, columns if group == -1 else group)
        found = rounded(weight, of_bits, of_group, symmetric=symmetric, groups=groups)
        written[f"{base}.weight"] = found
        made = gptq_tensors(found, of_bits, version=version)
        if bias_of_zeros and not re.search("[qkv]_proj$", base):
            made["bias"] = torch.zeros(len(weight), dtype=torch.float16)
        return {f"{base}.{end}": tensor for end, tensor in made.items()}

    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "sym": symmetric,
        "desc_act": desc_act,
        "damp_percent": 0.01,
        "true_sequential": True,
        "static_groups": False,
        "model_name_or_path": None,
        "model_file_base_name": "model",
        **({"checkpoint_format": "gptq_v2"} if version == 2 else {}),
        **({"lm_head": True} if head else {}),
        **(
            {"dynamic": {f"+:{others[0]}": {"bits": others[1], "group_size": others[2]}}} if others[1] else {}
        ),
        **(settings or {}),
    }
    rewrite(folder, config, change, LINEAR_AND_HEAD if head else LINEAR)
    return written


def make_awq(
    folder: Path,
    *,
    group: int = 32,
    symmetric: bool = False,
    settings: dict[str, Any] | None = None,
    **overrides: Any,
) -> Written:
    make_tiny_checkpoint(folder, dtype="float16", **{**SIZES, **overrides})
    written: Written = {}

    def change(base: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        found = rounded(weight, 4, group, symmetric=symmetric)
        written[f"{base}.weight"] = found
        return {f"{base}.{end}": tensor for end, tensor in awq_tensors(found).items()}

    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "version": "gemm",
        "zero_point": not symmetric,
        "modules_to_not_convert": None,
        **(settings or {}),
    }
    rewrite(folder, config, change)
    return written


def compressed_tensors(
    found: Rounded, bits: int, *, symmetric: bool, integers: bool
) -> dict[str, torch.Tensor]:
    half = 1 << (bits - 1)
    made = {"weight_scale": torch.from_numpy(found.scales.copy()).bfloat16()}
    if integers:
        made["weight"] = torch.from_numpy(found.codes.astype(np.int16) - half).to(torch.int8)
        if not symmetric:
            made["weight_zero_point"] = torch.from_numpy(found.zeros - half).to(torch.int8)
        return made
    made["weight_packed"] = packed(found.codes, bits)
    made["weight_shape"] = torch.tensor(found.codes.shape)
    if not symmetric:
        made["weight_zero_point"] = packed(found.zeros.T, bits).t().contiguous()
    return made


def make_compressed(
    folder: Path,
    *,
    bits: int = 4,
    group: int = 32,
    symmetric: bool = True,
    integers: bool = False,
    order: bool = False,
    settings: dict[str, Any] | None = None,
    weights: dict[str, Any] | None = None,
    **overrides: Any,
) -> Written:
    make_tiny_checkpoint(folder, dtype="bfloat16", **{**SIZES, **overrides})
    written: Written = {}

    def change(base: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        groups = order_of_inputs(len(base), weight.shape[1], group) if order else None
        found = rounded(weight, bits, group, symmetric=symmetric, groups=groups, scale_type=np.float32)
        found.scales = torch.from_numpy(found.scales).bfloat16().float().numpy()
        written[f"{base}.weight"] = found
        made = compressed_tensors(found, bits, symmetric=symmetric, integers=integers)
        if order:
            made["weight_g_idx"] = torch.from_numpy(found.groups.astype(np.int32))
        return {f"{base}.{end}": tensor for end, tensor in made.items()}

    of_weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group == -1 else "group",
        "group_size": None if group == -1 else group,
        "block_structure": None,
        "dynamic": False,
        "actorder": "group" if order else None,
        "observer": "minmax",
        "observer_kwargs": {},
        **(weights or {}),
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if integers else "pack-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": of_weights,
                "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": 1.4,
        "quantization_status": "compressed",
        **(settings or {}),
    }
    rewrite(folder, config, change)
    return written
