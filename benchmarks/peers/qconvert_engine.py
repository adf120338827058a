"""Ours: ``qconvert export`` and qrun's own generation loop, with default settings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from time import perf_counter

import numpy as np
from engine import Model, Timed, main

# What `qconvert export` is told for each variant of benchmarks/compare/peers.py.
EXPORTS = {
    "int4": ["--precision", "int4"],
    "int8": ["--precision", "int8"],
}
LOGITS_CHUNK = 128


def convert(source: Path, destination: Path, variant: str) -> None:
    command = [sys.executable, "-m", "qconvert.cli", "export", str(source), *EXPORTS[variant]]
    subprocess.run([*command, "--no-verify", "--force", "--output", str(destination)], check=True)


class QrunModel(Model):
    def __init__(self, folder: Path, variant: str, threads: int) -> None:
        from qrun.generate import Context
        from qrun.session import open_session

        self.session = open_session(folder, threads=threads)
        self.context = Context(self.session)
        self.settings = {"device": self.session.device}

    def reset(self, capacity: int) -> None:
        self.context.cache.trim(0)
        self.context.token_ids.clear()

    def run(self, ids: list[int], generate: int) -> Timed:
        from qrun.generate import Token
        from qrun.generate import generate as events
        from qrun.sampling_params import SamplingParams

        tokens: list[int] = []
        started = first = last = perf_counter()
        for event in events(self.context, ids, SamplingParams(max_tokens=generate, ignore_eos=True)):
            if isinstance(event, Token):
                last = perf_counter()
                first = last if not tokens else first
                tokens.append(event.token_id)
        return Timed(first - started, last - first, tokens)

    def logits(self, ids: list[int]) -> np.ndarray:
        cache = self.session.new_cache()
        pieces = [np.array([ids[at : at + LOGITS_CHUNK]]) for at in range(0, len(ids), LOGITS_CHUNK)]
        return np.concatenate([self.session.forward(piece, cache, "all")[0].copy() for piece in pieces])


if __name__ == "__main__":
    main(
        convert,
        QrunModel,
        libraries=("onnxruntime", "qrun.generate", "qrun.ort", "qrun.session"),
        packages=("onnxruntime", "numpy", "torch", "transformers"),
    )
