"""Matrices in codes, packed by the libraries that define the formats (``make test-formats`` installs them).

Each function takes a weight ``[N, K]`` and gives the tensors that its library would write, by the end of
their names, and what gives the floats that the library itself makes of them again.
"""

from __future__ import annotations

import importlib
import json
import sys
import types
from collections.abc import Callable
from functools import cache
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.qconvert.quantising import rounded

Packed = tuple[dict[str, torch.Tensor], Callable[[], torch.Tensor]]


def of_gptqmodel(
    weight: torch.Tensor, bits: int, group: int, *, symmetric: bool, groups: np.ndarray | None = None
) -> Packed:
    """GPTQModel's layer, version 2 of the format (zero points as they are).

    Args:
        weight: to be rounded to nearest.
        bits: of a code.
        group: how many inputs share a scale.
        symmetric: without zero points of their own.
        groups: the group of each input, where they have an order.
    """
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    rows, columns = weight.shape
    ordered = groups is not None
    groups = np.arange(columns) // group if groups is None else groups
    found = rounded(weight, bits, group, symmetric=symmetric, groups=groups)
    linear = torch.nn.Linear(columns, rows, bias=False)
    linear.weight.data = found.floats
    packer = TorchLinear(bits, group, symmetric, ordered, columns, rows)
    scales, zeros = torch.from_numpy(found.scales), torch.from_numpy(found.zeros)
    packer.pack_original(linear, scales.float(), zeros.float(), torch.from_numpy(groups).int())
    tensors = {end: getattr(packer, end).clone() for end in ("qweight", "qzeros", "scales", "g_idx")}

    def floats() -> torch.Tensor:
        packer.scales = packer.scales.float()
        packer.post_init()
        return packer.dequantize_weight().float().t()

    return tensors, floats


def of_autoawq(weight: torch.Tensor, group: int) -> Packed:
    """AutoAWQ's gemm packing of 4 bits with zero points."""
    gemm, packing = _autoawq("awq.modules.linear.gemm"), _autoawq("awq.utils.packing_utils")
    found = rounded(weight, 4, group, symmetric=False)
    linear = torch.nn.Linear(*reversed(found.floats.shape), bias=False)
    linear.weight.data = found.floats
    scales, zeros = (torch.from_numpy(each.T.copy()) for each in (found.scales, found.zeros))
    made = gemm.WQLinear_GEMM.from_linear(linear, 4, group, scales=scales.float(), zeros=zeros.float())
    tensors = {end: getattr(made, end) for end in ("qweight", "qzeros", "scales")}

    def floats() -> torch.Tensor:
        return packing.dequantize_gemm(made.qweight, made.qzeros, made.scales.float(), 4, group).t()

    return tensors, floats


@cache
def _autoawq(name: str) -> Any:
    """A module of AutoAWQ without its models, which import what transformers 5 has no more."""
    root = Path(str(distribution("autoawq").locate_file("awq")))
    for part in ("awq", "awq.modules", "awq.modules.linear", "awq.utils"):
        module = types.ModuleType(part)
        module.__path__ = [str(root.joinpath(*part.split(".")[1:]))]
        sys.modules[part] = module
    try:
        return importlib.import_module(name)
    finally:  # other libraries look whether there is an awq
        for part in [part for part in sys.modules if part.partition(".")[0] == "awq"]:
            del sys.modules[part]


def of_compressed_tensors(weight: torch.Tensor, form: str, settings: dict[str, Any]) -> Packed:
    """compressed-tensors' compressor of a format, with scales found by rounding to nearest."""
    from compressed_tensors.compressors import BaseCompressor

    scheme = scheme_of(form, settings)
    compressor = BaseCompressor.get_value_from_registry(form)
    state = {"weight": weight.clone(), **_parameters(weight, scheme.weights)}
    compressed = compressor.compress(state, scheme)
    tensors = {end: tensor.contiguous() for end, tensor in compressed.items()}

    def floats() -> torch.Tensor:
        return compressor.decompress(compressed, scheme)["weight"].float()

    return tensors, floats


def scheme_of(form: str, settings: dict[str, Any]) -> Any:
    """compressed-tensors' own description of how weights are stored."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**settings), format=form)


def _parameters(weight: torch.Tensor, args: Any) -> dict[str, torch.Tensor]:
    """Scales, and zero points where the format has them."""
    rows, columns = weight.shape
    high, wide = {
        "group": (1, args.group_size),
        "channel": (1, columns),
        "tensor": (rows, columns),
        "block": tuple(args.block_structure or (0, 0)),
    }[args.strategy]
    tiles = weight.view(rows // high, high, columns // wide, wide).transpose(1, 2).flatten(2)
    if args.type == "float":
        scales = tiles.abs().amax(-1) / 448
    elif args.symmetric:
        scales = tiles.abs().amax(-1) / ((1 << (args.num_bits - 1)) - 0.5)
    else:
        low, top = tiles.amin(-1).clamp(max=0), tiles.amax(-1).clamp(min=0)
        scales = (top - low) / ((1 << args.num_bits) - 1)
        zeros = (-(1 << (args.num_bits - 1)) - low / scales).round()
        return {"weight_scale": scales, "weight_zero_point": zeros.to(torch.int8)}
    return {"weight_scale": scales.squeeze() if args.strategy == "tensor" else scales}


def gptq_config(bits: int, group: int, *, symmetric: bool, ordered: bool) -> dict[str, Any]:
    """``quantization_config`` as GPTQModel writes it, with what it says of the weights."""
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2",
        "bits": bits,
        "group_size": group,
        "sym": symmetric,
        "desc_act": ordered,
    }


def awq_config(group: int) -> dict[str, Any]:
    """As AutoAWQ writes it."""
    return {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}


def compressed_config(form: str, settings: dict[str, Any]) -> dict[str, Any]:
    """As compressed-tensors writes it."""
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": json.loads(scheme_of(form, settings).model_dump_json())},
        "ignore": ["lm_head"],
    }
