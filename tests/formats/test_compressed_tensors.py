"""If one of these fails, we read compressed-tensors otherwise than the library that defines them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file

from qconvert.checkpoint.load import load_model, open_checkpoint
from qconvert.checkpoint.weights import CheckpointWeights
from tests.qconvert.quantising import LINEAR, SIZES
from tests.tiny import make_tiny_checkpoint

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
    folder = make_tiny_checkpoint(tmp_path / "model", **SIZES)
    weights = CheckpointWeights(load_model(open_checkpoint(folder)))
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**settings), format=form)
    compressor = BaseCompressor.get_value_from_registry(form)
    tensors, due = {}, {}
    for name in weights._tensors:
        if not LINEAR.search(name):
            tensors[name] = weights[name].clone()
            continue
        state = {"weight": weights[name].clone(), **parameters(weights[name], scheme.weights)}
        compressed = compressor.compress(state, scheme)
        due[name] = compressor.decompress(compressed, scheme)["weight"].float()
        base = name.removesuffix(".weight")
        tensors |= {f"{base}.{end}": tensor.contiguous() for end, tensor in compressed.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": json.loads(scheme.model_dump_json())},
        "ignore": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    found = CheckpointWeights(load_model(open_checkpoint(folder)))
    for name, tensor in due.items():
        assert torch.equal(found[name], tensor), name


def parameters(weight: torch.Tensor, args: QuantizationArgs) -> dict[str, torch.Tensor]:
    """Scales, and zero points where the format has them, found by rounding to nearest."""
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
