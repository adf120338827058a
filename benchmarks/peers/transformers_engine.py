"""transformers in PyTorch, eager, with its growing cache: what a checkpoint costs without any conversion."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from engine import Model, main

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


def convert(source: Path, destination: Path, variant: str) -> None:
    """The checkpoint itself if its type is the variant's or is widened on loading, else one in that type."""
    config = json.loads((source / "config.json").read_text())
    stored = config.get("dtype") or config.get("torch_dtype")
    destination.mkdir(parents=True, exist_ok=True)
    if stored == "float32" and variant != "fp32":
        load(source, variant).save_pretrained(destination)
        return
    for path in source.iterdir():
        if path.name.startswith("model"):
            (destination / path.name).symlink_to(path.resolve())
        elif path.is_file():
            shutil.copy(path, destination)


def load(folder: Path, variant: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[variant]).eval()


class TransformersModel(Model):
    def __init__(self, folder: Path, variant: str, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.torch = torch
        self.model = load(folder, variant)
        self.cache: Any = None
        self.settings = {"dtype": DTYPES[variant], "attention": self.model.config._attn_implementation}

    def reset(self, capacity: int) -> None:
        self.cache = None

    def _forward(self, ids: list[int], keep: int) -> Any:
        output = self.model(
            self.torch.tensor([ids]), past_key_values=self.cache, use_cache=True, logits_to_keep=keep
        )
        self.cache = output.past_key_values
        return output.logits[0]

    def prompt(self, ids: list[int]) -> int:
        return int(self._forward(ids, 1)[-1].argmax())

    def step(self, token: int) -> int:
        return self.prompt([token])

    def logits(self, ids: list[int]) -> np.ndarray:
        found: np.ndarray = self._forward(ids, 0).float().numpy()
        return found


if __name__ == "__main__":
    main(
        convert,
        TransformersModel,
        libraries=("torch", "transformers:AutoModelForCausalLM", "transformers:Qwen2ForCausalLM"),
        packages=("torch", "transformers", "numpy"),
    )
