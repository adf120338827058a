"""LoRA adapters as peft writes them, made here of NumPy's random numbers, and what they do to a model."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

PREFIX = "base_model.model."
CONFIG = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "auto_mapping": None,
    "base_model_name_or_path": "tiny",
    "bias": "none",
    "corda_config": None,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.05,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "qalora_group_size": 16,
    "r": 4,
    "rank_pattern": {},
    "revision": None,
    "target_modules": ["q_proj", "v_proj"],
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
}


def make_adapter(
    folder: Path,
    base: Path,
    *,
    modules: str = r"(q|v)_proj",
    rank: int = 4,
    ranks: dict[str, int] | None = None,
    alphas: dict[str, float] | None = None,
    saved: tuple[str, ...] = (),
    biases: bool = False,
    seed: int = 0,
    dtype: str = "float32",
    **settings: Any,
) -> dict[str, torch.Tensor]:
    """Writes an adapter; returns what it adds (or, of ``saved`` and biases, what it puts in the place).

    Args:
        modules: an expression for the ends of the names of its modules.
        ranks, alphas: of modules whose names end so, other than the rest; they become the patterns.
        saved: ends of modules that are replaced.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    changes: dict[str, torch.Tensor] = {}
    config = {**CONFIG, "r": rank, "rank_pattern": ranks or {}, "alpha_pattern": alphas or {}, **settings}

    def noise(*shape: int) -> torch.Tensor:
        return (0.3 * torch.randn(shape, generator=generator)).to(getattr(torch, dtype))

    for name, weight in load_file(base / "model.safetensors").items():
        module, _, kind = name.rpartition(".")
        if any(module.endswith(end) for end in saved):
            changes[name] = noise(*weight.shape).float()
            tensors[f"{PREFIX}{name}"] = changes[name]
        if biases and kind == "bias" and re.search(f"{modules}$", module):
            changes[name] = noise(*weight.shape).float()
            tensors[f"{PREFIX}{module}.base_layer.bias"] = changes[name]
        if kind != "weight" or not re.search(f"{modules}$", module):
            continue
        r = next((value for end, value in (ranks or {}).items() if module.endswith(end)), rank)
        alpha = next((value for end, value in (alphas or {}).items() if module.endswith(end)), 8)
        factor = alpha / (math.sqrt(r) if config["use_rslora"] else r)
        rows, columns = weight.shape
        if module.endswith("embed_tokens"):
            first, second = noise(r, rows), noise(columns, r)
            tensors[f"{PREFIX}{module}.lora_embedding_A"] = first
            tensors[f"{PREFIX}{module}.lora_embedding_B"] = second
            changes[name] = factor * (second.float() @ first.float()).t()
        else:
            first, second = noise(r, columns), noise(rows, r)
            tensors[f"{PREFIX}{module}.lora_A.weight"] = first
            tensors[f"{PREFIX}{module}.lora_B.weight"] = second
            changes[name] = factor * (second.float() @ first.float())
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return changes
