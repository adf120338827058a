"""Ours: ``qconvert export`` and qrun's own generation loop, with default settings."""

from __future__ import annotations

import sys
from copy import copy
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
    temperature = 0.0

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

        tokens: list[int] = []
        started = first = last = perf_counter()
        for event in events(self.context, ids, self._params(generate)):
            if isinstance(event, Token):
                last = perf_counter()
                first = last if not tokens else first
                tokens.append(event.token_id)
        return Timed(first - started, last - first, tokens)

    def _params(self, generate: int | None) -> Any:
        from qrun.sampling.params import SamplingParams

        if not self.temperature:
            return SamplingParams(max_tokens=generate, ignore_eos=True)
        drawn = {"temperature": self.temperature, "top_k": 0, "top_p": 1.0, "seed": 0}
        return SamplingParams(max_tokens=generate, ignore_eos=True, do_sample=True, **drawn)

    def rows(self, prompts: list[list[int]], generate: int) -> float:
        from qrun.decoding.scheduler import Scheduler
        from qrun.decoding.sequence import Sequence
        from qrun.decoding.slots import Slots

        scheduler = Scheduler(Slots(self.session, len(prompts)), grain=None)
        limit = self.session.manifest.model.context_length
        sequences = [Sequence(ids, self._params(None), limit) for ids in prompts]
        for sequence in sequences:
            scheduler.add(sequence)
        while not all(sequence.token_ids for sequence in sequences):
            scheduler.step()
        started = perf_counter()
        for _ in range(generate - 1):
            scheduler.step()
        return perf_counter() - started

    def plain(self, temperature: float) -> QrunModel:
        return self._with(speculate=False, temperature=temperature)

    def guessing(self, temperature: float) -> QrunModel:
        return self._with(speculate=True, temperature=temperature)

    def _with(self, *, speculate: bool, temperature: float) -> QrunModel:
        from qrun.decoding.generate import Context

        other = copy(self)
        other.context, other.temperature = Context(self.session, speculate=speculate), temperature
        return other

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
