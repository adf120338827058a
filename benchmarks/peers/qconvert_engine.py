"""Ours: ``qconvert export`` and qrun's own generation loop, with default settings."""

from __future__ import annotations

import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from engine import Model, Timed, call, main
from our_variants import VARIANTS

LOGITS_CHUNK = 128


def convert(source: Path, destination: Path, variant: str) -> None:
    command = [sys.executable, "-m", "qconvert.cli", "export", str(source), *VARIANTS[variant][1]]
    call([*command, "--no-verify", "--force", "--output", str(destination)])


class QrunModel(Model):
    def __init__(self, folder: Path, variant: str, threads: int) -> None:
        from qrun.backends.opening import open_session
        from qrun.decoding.generate import Context

        self.session = open_session(folder, threads=threads)
        self.context = Context(self.session)
        self.settings = {"device": self.session.device}

    def reset(self, capacity: int) -> None:
        self.context.cache.trim(0)
        self.context.token_ids.clear()

    def run(self, ids: list[int], generate: int) -> Timed:
        from qrun.decoding.generate import Token
        from qrun.decoding.generate import generate as events
        from qrun.sampling.params import SamplingParams

        tokens: list[int] = []
        started = first = last = perf_counter()
        for event in events(self.context, ids, SamplingParams(max_tokens=generate, ignore_eos=True)):
            if isinstance(event, Token):
                last = perf_counter()
                first = last if not tokens else first
                tokens.append(event.token_id)
        return Timed(first - started, last - first, tokens)

    def logits(self, ids: list[int]) -> np.ndarray:
        """All positions by the decode graph; with a second graph for prompts, the later half after it.

        That graph has no logits: what it does to an answer shows in the positions that follow the keys and
        values that it wrote.
        """
        if self.session.manifest.prefill is None:
            return self._read(ids, self.session.new_cache())
        half = len(ids) // 2
        first, cache = self._read(ids[:half], self.session.new_cache()), self.session.new_cache()
        self.session.forward(np.array([ids[:half]]), cache, "none")
        return np.concatenate([first, self._read(ids[half:], cache)])

    def _read(self, ids: list[int], cache: Any) -> np.ndarray:
        pieces = [np.array([ids[at : at + LOGITS_CHUNK]]) for at in range(0, len(ids), LOGITS_CHUNK)]
        return np.concatenate([self.session.forward(piece, cache, "all")[0].copy() for piece in pieces])


if __name__ == "__main__":
    main(
        convert,
        QrunModel,
        libraries=(
            "onnxruntime",
            "qrun.decoding.generate",
            "qrun.backends.ort.session",
            "qrun.backends.opening",
        ),
        packages=("onnxruntime", "numpy", "torch", "transformers"),
    )
