"""onnxruntime-genai: its model builder, and its generator fed with token ids."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from engine import Model, call, main


def convert(source: Path, destination: Path, variant: str) -> None:
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", "model", "-i", str(source)]
    with tempfile.TemporaryDirectory(dir=destination.parent) as cache:
        command += ["-o", str(destination), "-p", variant, "-e", "cpu", "-c", cache]
        call(command)


class GenaiModel(Model):
    def __init__(self, folder: Path, variant: str, threads: int) -> None:
        import onnxruntime_genai

        self.library = onnxruntime_genai
        self.folder, self.threads = folder, threads
        config = onnxruntime_genai.Config(str(folder))
        options = {"intra_op_num_threads": threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.model = onnxruntime_genai.Model(config)
        self.settings = options

    def reset(self, capacity: int) -> None:
        params = self.library.GeneratorParams(self.model)
        # min_length keeps end tokens from being chosen, so that the generator goes on to the last.
        params.set_search_options(max_length=capacity, min_length=capacity, do_sample=False)
        self.generator = None  # the old one's cache goes before the new one's comes
        self.generator = self.library.Generator(self.model, params)

    def _next(self) -> int:
        self.generator.generate_next_token()
        return int(self.generator.get_next_tokens()[0])

    def prompt(self, ids: list[int]) -> int:
        self.generator.append_tokens(np.array([ids], dtype=np.int32))
        return self._next()

    def step(self, token: int) -> int:
        return self._next()  # the generator feeds the token that it chose before

    def logits(self, ids: list[int]) -> np.ndarray:
        """Through the same graph and kernels in ONNX Runtime: the generator keeps the last position alone."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        session = onnxruntime.InferenceSession(
            str(self.folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        decoder = json.loads((self.folder / "genai_config.json").read_text())["model"]["decoder"]
        empty = np.zeros((1, decoder["num_key_value_heads"], 0, decoder["head_size"]), dtype=np.float32)
        given = {}
        for port in session.get_inputs():
            if port.name == "input_ids":
                given[port.name] = np.array([ids], dtype=np.int64)
            elif port.name == "attention_mask":
                given[port.name] = np.ones((1, len(ids)), dtype=np.int64)
            elif port.name == "position_ids":
                given[port.name] = np.arange(len(ids), dtype=np.int64)[None]
            else:
                given[port.name] = empty
        found: np.ndarray = session.run(["logits"], given)[0][0]
        return found


if __name__ == "__main__":
    main(
        convert,
        GenaiModel,
        libraries=("onnxruntime_genai",),
        packages=("onnxruntime-genai", "onnxruntime", "numpy", "torch", "transformers"),
    )
