"""optimum-onnx: its export to ONNX, and ``ORTModelForCausalLM`` with its growing cache."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from engine import Model, call, main


def convert(source: Path, destination: Path, variant: str) -> None:
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "onnx", "--model", str(source)]
    command += ["--task", "text-generation-with-past", "--no-post-process", "--dtype", variant]
    call([*command, str(destination)])


class OptimumModel(Model):
    def __init__(self, folder: Path, variant: str, threads: int) -> None:
        import onnxruntime
        import torch
        from optimum.onnxruntime import ORTModelForCausalLM

        torch.set_num_threads(threads)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.torch = torch
        self.model = ORTModelForCausalLM.from_pretrained(
            folder, provider="CPUExecutionProvider", session_options=options, use_cache=True
        )
        self.settings = {"intra_op_num_threads": threads}
        self.reset(0)

    def reset(self, capacity: int) -> None:
        self.cache: Any = None
        self.length = 0

    def _forward(self, ids: list[int]) -> Any:
        total = self.length + len(ids)
        output = self.model(
            input_ids=self.torch.tensor([ids]),
            attention_mask=self.torch.ones((1, total), dtype=self.torch.int64),
            position_ids=self.torch.arange(self.length, total)[None],
            past_key_values=self.cache,
            use_cache=True,
        )
        self.cache, self.length = output.past_key_values, total
        return output.logits[0]

    def prompt(self, ids: list[int]) -> int:
        return int(self._forward(ids)[-1].argmax())

    def step(self, token: int) -> int:
        return self.prompt([token])

    def logits(self, ids: list[int]) -> np.ndarray:
        found: np.ndarray = self._forward(ids).float().numpy()
        return found


if __name__ == "__main__":
    main(
        convert,
        OptimumModel,
        libraries=(
            "torch",
            "onnxruntime",
            "transformers:Qwen2ForCausalLM",
            "optimum.onnxruntime:ORTModelForCausalLM",
        ),
        packages=("optimum-onnx", "optimum", "onnxruntime", "torch", "transformers"),
    )
