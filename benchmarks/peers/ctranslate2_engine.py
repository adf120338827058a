"""CTranslate2: its converter for Qwen2, and ``Generator.generate_batch`` with the time of every token."""

from __future__ import annotations

import json
from pathlib import Path
from time import perf_counter

import numpy as np
from engine import Model, Timed, main


def convert(source: Path, destination: Path, variant: str) -> None:
    import ctranslate2

    converter = ctranslate2.converters.TransformersConverter(str(source), low_cpu_mem_usage=True)
    converter.convert(str(destination), quantization=variant, force=True)


class CTranslate2Model(Model):
    def __init__(self, folder: Path, variant: str, threads: int) -> None:
        import ctranslate2

        self.generator = ctranslate2.Generator(
            str(folder), device="cpu", compute_type=variant, inter_threads=1, intra_threads=threads
        )
        self.words: list[str] = json.loads((folder / "vocabulary.json").read_text())
        self.settings = {"compute_type": self.generator.compute_type}

    def run(self, ids: list[int], generate: int) -> Timed:
        prompt = [self.words[token] for token in ids]  # generate_batch takes the names of tokens
        times: list[float] = []
        tokens: list[int] = []

        def note(step: object) -> bool:
            times.append(perf_counter())
            tokens.append(step.token_id)  # type: ignore[attr-defined]
            return False

        started = perf_counter()
        self.generator.generate_batch(
            [prompt],
            max_length=generate,
            min_length=generate,
            sampling_topk=1,
            beam_size=1,
            include_prompt_in_result=False,
            callback=note,
        )
        return Timed(times[0] - started, times[-1] - times[0], tokens)

    def logits(self, ids: list[int]) -> np.ndarray:
        return np.array(self.generator.forward_batch([ids]))[0]


if __name__ == "__main__":
    main(
        convert,
        CTranslate2Model,
        libraries=("ctranslate2",),
        packages=("ctranslate2", "numpy", "torch", "transformers"),
    )
