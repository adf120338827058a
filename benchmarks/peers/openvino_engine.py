"""OpenVINO GenAI: conversion by optimum-intel, speed by ``LLMPipeline``, logits by the bare model."""

from __future__ import annotations

import json
import sys
from copy import copy
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar

import numpy as np
from engine import Model, Timed, call, main


def convert(source: Path, destination: Path, variant: str) -> None:
    hidden = json.loads((source / "config.json").read_text())["hidden_size"]
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "openvino"]
    command += ["--model", str(source), "--task", "text-generation-with-past", "--weight-format", variant]
    if variant == "int4" and hidden % 128:  # the default size of a group, 128, has to divide every row
        command += ["--group-size", "64"]
    call([*command, str(destination)])


def properties(threads: int) -> dict[str, Any]:
    return {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}


class OpenVINOModel(Model):
    batching: Any = None
    guesses: ClassVar[dict[str, int]] = {}

    def __init__(self, folder: Path, variant: str, threads: int) -> None:
        import openvino_genai

        self.folder, self.threads = folder, threads
        self.pipeline = openvino_genai.LLMPipeline(folder, "CPU", **properties(threads))
        self.settings = {**properties(threads), "KV cache and dynamic quantisation": "as OpenVINO chooses"}

    def rows(self, prompts: list[list[int]], generate: int) -> float:
        """By its continuous batching, each prompt in one piece."""
        import openvino
        import openvino_genai

        if self.batching is None:
            scheduling = openvino_genai.SchedulerConfig()
            scheduling.cache_size = 2  # GB
            self.batching = openvino_genai.ContinuousBatchingPipeline(
                self.folder, scheduling, "CPU", {"INFERENCE_NUM_THREADS": self.threads}
            )
        config = openvino_genai.GenerationConfig(max_new_tokens=generate, ignore_eos=True)
        config.do_sample = False
        handles = [
            self.batching.add_request(row, openvino.Tensor(np.array([ids], dtype=np.int64)), config)
            for row, ids in enumerate(prompts)
        ]
        begun: set[int] = set()
        started = perf_counter()
        while self.batching.has_non_finished_requests():
            self.batching.step()
            if len(begun) < len(handles):
                begun |= {row for row, handle in enumerate(handles) if handle.can_read()}
                started = perf_counter()
        return perf_counter() - started

    def guessing(self, temperature: float) -> OpenVINOModel:
        """Prompt lookup with the values of its documentation."""
        import openvino_genai

        if temperature:
            raise NotImplementedError
        other = copy(self)
        other.pipeline = openvino_genai.LLMPipeline(
            self.folder, "CPU", prompt_lookup=True, **properties(self.threads)
        )
        other.guesses = {"num_assistant_tokens": 5, "max_ngram_size": 3}
        return other

    def run(self, ids: list[int], generate: int) -> Timed:
        import openvino
        import openvino_genai

        config = openvino_genai.GenerationConfig(max_new_tokens=generate, ignore_eos=True)
        config.do_sample = False
        config.apply_chat_template = False
        for name, value in self.guesses.items():
            setattr(config, name, value)
        inputs = openvino.Tensor(np.array([ids], dtype=np.int64))
        started = perf_counter()
        result = self.pipeline.generate(inputs, config)
        total = perf_counter() - started
        first = result.perf_metrics.get_ttft().mean / 1e3  # its own clock, in milliseconds
        return Timed(first, total - first, list(result.tokens[0]))

    def logits(self, ids: list[int]) -> np.ndarray:
        import openvino

        core = openvino.Core()
        model = core.compile_model(self.folder / "openvino_model.xml", "CPU", properties(self.threads))
        request = model.create_infer_request()
        given = {
            "input_ids": np.array([ids], dtype=np.int64),
            "attention_mask": np.ones((1, len(ids)), dtype=np.int64),
            "position_ids": np.arange(len(ids), dtype=np.int64)[None],
            "beam_idx": np.zeros(1, dtype=np.int32),
        }
        names = {name for port in model.inputs for name in port.names}
        request.infer({name: value for name, value in given.items() if name in names})
        return np.array(request.get_tensor("logits").data[0], dtype=np.float32)


if __name__ == "__main__":
    main(
        convert,
        OpenVINOModel,
        libraries=("openvino", "openvino_genai"),
        packages=("openvino-genai", "openvino", "optimum-intel", "nncf", "torch", "transformers"),
    )
