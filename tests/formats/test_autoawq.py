"""If this fails, we read AWQ's codes otherwise than AutoAWQ writes them."""

from __future__ import annotations

import importlib
import json
import sys
import types
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qconvert.checkpoint.load import load_model, open_checkpoint
from qconvert.checkpoint.weights import CheckpointWeights
from tests.qconvert.quantising import LINEAR, SIZES, rounded
from tests.tiny import make_tiny_checkpoint


def autoawq(name: str) -> Any:
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


@pytest.mark.parametrize("group", [32, 64, 128])
def test_what_autoawq_packs_we_read(tmp_path: Path, group: int) -> None:
    gemm, packing = autoawq("awq.modules.linear.gemm"), autoawq("awq.utils.packing_utils")
    folder = make_tiny_checkpoint(tmp_path / "model", dtype="float16", **SIZES)
    weights = CheckpointWeights(load_model(open_checkpoint(folder)))
    tensors, due = {}, {}
    for name in weights._tensors:
        if not LINEAR.search(name):
            tensors[name] = weights[name].clone()
            continue
        found = rounded(weights[name], 4, group, symmetric=False)
        linear = torch.nn.Linear(*reversed(found.floats.shape), bias=False)
        linear.weight.data = found.floats
        scales, zeros = (torch.from_numpy(each.T.copy()) for each in (found.scales, found.zeros))
        made = gemm.WQLinear_GEMM.from_linear(linear, 4, group, scales=scales.float(), zeros=zeros.float())
        base = name.removesuffix(".weight")
        tensors |= {f"{base}.{end}": getattr(made, end) for end in ("qweight", "qzeros", "scales")}
        due[name] = packing.dequantize_gemm(made.qweight, made.qzeros, made.scales.float(), 4, group).t()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "version": "gemm",
        "zero_point": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    read = CheckpointWeights(load_model(open_checkpoint(folder)))
    for name, tensor in due.items():
        assert torch.equal(read[name], tensor), name
