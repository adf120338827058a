"""If this fails, we read GPTQ's codes otherwise than GPTQModel writes and reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from safetensors.torch import save_file

from qconvert.checkpoint.load import load_model, open_checkpoint
from qconvert.checkpoint.weights import CheckpointWeights
from tests.qconvert.quantising import LINEAR, SIZES, order_of_inputs, rounded
from tests.tiny import make_tiny_checkpoint

KINDS: dict[str, dict[str, Any]] = {
    "4 bits, symmetric": {"bits": 4, "symmetric": True},
    "4 bits": {"bits": 4, "symmetric": False},
    "8 bits": {"bits": 8, "symmetric": False},
    "an order of inputs": {"bits": 4, "symmetric": False, "order": True},
    "an order of inputs, 8 bits, symmetric": {"bits": 8, "symmetric": True, "order": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_gptqmodel_packs_we_read(tmp_path: Path, kind: str) -> None:
    settings = KINDS[kind]
    bits, symmetric, group = settings["bits"], settings["symmetric"], 32
    folder = make_tiny_checkpoint(tmp_path / "model", dtype="float16", **SIZES)
    weights = CheckpointWeights(load_model(open_checkpoint(folder)))
    tensors, due = {}, {}
    for name in weights._tensors:
        if not LINEAR.search(name):
            tensors[name] = weights[name].clone()
            continue
        rows, columns = weights.shape(name)
        groups = order_of_inputs(3, columns, group) if settings.get("order") else np.arange(columns) // group
        found = rounded(weights[name], bits, group, symmetric=symmetric, groups=groups)
        linear = torch.nn.Linear(columns, rows, bias=False)
        linear.weight.data = found.floats
        packer = TorchLinear(bits, group, symmetric, bool(settings.get("order")), columns, rows)
        scales, zeros = torch.from_numpy(found.scales), torch.from_numpy(found.zeros)
        packer.pack_original(linear, scales.float(), zeros.float(), torch.from_numpy(groups).int())
        base = name.removesuffix(".weight")
        tensors |= {
            f"{base}.{end}": getattr(packer, end).clone() for end in ("qweight", "qzeros", "scales", "g_idx")
        }
        packer.scales = packer.scales.float()
        packer.post_init()
        due[name] = packer.dequantize_weight().float().t()
        assert torch.equal(due[name], found.floats)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2",
        "bits": bits,
        "group_size": group,
        "sym": symmetric,
        "desc_act": bool(settings.get("order")),
    }
    (folder / "config.json").write_text(json.dumps(config))
    read = CheckpointWeights(load_model(open_checkpoint(folder)))
    for name, tensor in due.items():
        assert torch.equal(read[name], tensor), name
