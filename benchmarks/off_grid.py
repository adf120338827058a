"""Write a checkpoint that computes the same, off any quantiser's grid: python -m benchmarks.off_grid IN OUT

Weights that were dequantised from blocks lie on a grid, which flatters formats with such blocks. Channels are
scaled against one another by random factors, which cancel: norms against the matrices behind them, the rows
of up_proj against the columns of down_proj, and those of v_proj against the columns of o_proj. It is stored
in float32, since bfloat16 would round what the factors move.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from qconvert.folder.tensors import save_tensors

LARGEST = 2.0  # factors lie between its inverse and itself, evenly on a logarithmic scale


def off_grid(source: Path, target: Path, *, seed: int = 0) -> None:
    """Write it.

    Args:
        source: a Qwen2 or Llama checkpoint in one safetensors file.
        target: a folder that does not exist.
        seed: of the factors.
    """
    config = json.loads((source / "config.json").read_text())
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    tensors = {name: value.float() for name, value in load_file(source / "model.safetensors").items()}
    generator = torch.Generator().manual_seed(seed)

    def factors(count: int) -> torch.Tensor:
        drawn = torch.rand(count, generator=generator) * 2 - 1
        return torch.exp(drawn * torch.log(torch.tensor(LARGEST)))

    def scale(name: str, by: torch.Tensor) -> None:
        if name in tensors:  # a bias that a family does not have
            tensors[name] = tensors[name] * by

    for layer in range(config["num_hidden_layers"]):
        start = f"model.layers.{layer}."
        for norm, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            by = factors(config["hidden_size"])
            scale(f"{start}{norm}.weight", 1 / by)
            for reader in readers:
                scale(f"{start}{reader}.weight", by)
        by = factors(config["intermediate_size"])
        scale(f"{start}mlp.up_proj.weight", by[:, None])
        scale(f"{start}mlp.down_proj.weight", 1 / by)
        by = factors(groups * size)
        scale(f"{start}self_attn.v_proj.weight", by[:, None])
        scale(f"{start}self_attn.v_proj.bias", by)
        shared = by.view(groups, 1, size).expand(groups, heads // groups, size).reshape(-1)
        scale(f"{start}self_attn.o_proj.weight", 1 / shared)
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix in (".json", ".jinja", ".txt", "") and path.is_file():
            shutil.copy(path, target)
    (target / "config.json").write_text(
        json.dumps(
            {key: value for key, value in config.items() if key != "dtype"} | {"torch_dtype": "float32"}
        )
    )
    save_tensors({name: value.contiguous() for name, value in tensors.items()}, target / "model.safetensors")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.off_grid", description=__doc__.splitlines()[0]
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    off_grid(arguments.source, arguments.target)
