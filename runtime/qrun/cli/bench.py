"""How fast a model folder runs on this machine, measured through the loop that ``generate`` uses."""

from __future__ import annotations

import platform
import resource
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from qrun.backends.session import Session
from qrun.decoding.generate import PREFILL_CHUNK, Context, Finished, generate
from qrun.errors import QrunError
from qrun.folder.manifest import Manifest
from qrun.sampling.params import SamplingParams

_CPU_FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm")


@dataclass(frozen=True)
class Workload:
    """One thing to measure: a prompt after ``depth`` cached tokens, then greedy generation; in tokens."""

    prompt_tokens: int
    generated_tokens: int
    depth: int = 0


@dataclass(frozen=True)
class Round:
    """One repetition. Prefill counts new prompt tokens; decode counts steps after the first token."""

    prefill_seconds: float
    decode_seconds: float
    first_token_seconds: float


@dataclass(frozen=True)
class Measured:
    """A workload and its rounds."""

    workload: Workload
    rounds: tuple[Round, ...]

    def prefill_rates(self) -> list[float]:
        """Prompt tokens per second, round by round."""
        return [self.workload.prompt_tokens / each.prefill_seconds for each in self.rounds]

    def decode_rates(self) -> list[float]:
        """Generated tokens per second, round by round; empty where only one token was asked for."""
        steps = self.workload.generated_tokens - 1
        return [steps / each.decode_seconds for each in self.rounds] if steps else []

    def to_json(self) -> dict[str, Any]:
        """Medians, and the range of each rate; seconds and tokens per second."""
        prefill, decode = self.prefill_rates(), self.decode_rates()
        return {
            **asdict(self.workload),
            "repetitions": len(self.rounds),
            "prefill_tokens_per_second": median(prefill),
            "prefill_range": [min(prefill), max(prefill)],
            "decode_tokens_per_second": median(decode) if decode else None,
            "decode_range": [min(decode), max(decode)] if decode else None,
            "seconds_per_output_token": 1 / median(decode) if decode else None,
            "time_to_first_token": median(each.first_token_seconds for each in self.rounds),
        }


def measure(
    session: Session, workload: Workload, *, repetitions: int, chunk: int = PREFILL_CHUNK
) -> Iterator[Measured]:
    """Run a workload once to warm up and then ``repetitions`` times; yields after each counted round.

    The prompt is random token ids: speed does not depend on them. Every round begins with the same cache of
    ``depth`` tokens, and end tokens are ignored.

    Raises:
        QrunError: the workload does not fit into the model's context.
    """
    _check(session.manifest, workload)
    total = workload.depth + workload.prompt_tokens
    ids = np.random.default_rng(0).integers(0, session.manifest.model.vocab_size, total).tolist()
    params = SamplingParams(max_tokens=workload.generated_tokens, ignore_eos=True)
    context = Context(session)
    for start in range(0, workload.depth, chunk):
        context.feed(ids[start : min(start + chunk, workload.depth)], logits="none")
    rounds: list[Round] = []
    for number in range(repetitions + 1):
        context.cache.trim(workload.depth)
        del context.token_ids[workload.depth :]
        started, first, last = perf_counter(), 0.0, None
        for event in generate(context, ids, params, chunk=chunk):
            last = event
            if first == 0.0 and hasattr(event, "token_id"):
                first = perf_counter() - started
        assert isinstance(last, Finished), "the loop ends with its summary"
        assert last.completion_tokens == workload.generated_tokens
        if number > 0:  # the first one pays for memory that the others find in place
            rounds.append(Round(last.prefill_seconds, last.decode_seconds, first))
            yield Measured(workload, tuple(rounds))


def workloads(prompts: Sequence[int], generated: Sequence[int], depths: Sequence[int]) -> list[Workload]:
    """Every combination, in the order given."""
    return [Workload(prompt, new, depth) for depth in depths for prompt in prompts for new in generated]


def conditions(session: Session, load_seconds: float) -> dict[str, Any]:
    """What a figure depends on: machine, versions, model and device; ``peak_rss_bytes`` is this process's."""
    manifest = session.manifest
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": _machine(),
        "device": session.device,
        "versions": _versions(),
        "model": {"name": manifest.name, "precision": manifest.precision, **_identity(session)},
        "load_seconds": load_seconds,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def peak_rss_bytes() -> int:
    """The largest resident set of this process so far, mapped files included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def _check(manifest: Manifest, workload: Workload) -> None:
    for name, value in asdict(workload).items():
        if value < (0 if name == "depth" else 1):
            raise QrunError(f"{name} is {value}", hint="give a positive number of tokens")
    # The last generated token is sampled and never fed.
    needed = workload.depth + workload.prompt_tokens + workload.generated_tokens - 1
    if needed > manifest.model.context_length:
        raise QrunError(
            f"depth {workload.depth:,}, prompt {workload.prompt_tokens:,} and {workload.generated_tokens:,} "
            f"generated tokens exceed the context of {manifest.model.context_length:,}",
            hint="measure shorter lengths",
        )


def _identity(session: Session) -> dict[str, Any]:
    """Bytes and SHA-256 of what was run: the plan, or the folder by its weights."""
    manifest, engine = session.manifest, getattr(session, "engine", None)
    if engine is not None:
        return {"bytes": engine.facts.plan_size, "sha256": engine.facts.plan_sha256}
    hashes = {entry.path: entry.sha256 for entry in manifest.files}
    return {
        "bytes": sum(entry.size for entry in manifest.files),
        "sha256": hashes.get(f"{manifest.graph}.data", hashes.get(manifest.graph)),
    }


def _machine() -> dict[str, Any]:
    model, flags = platform.processor() or platform.machine(), frozenset[str]()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = frozenset(value.split())
                break
    except OSError:
        pass
    return {
        "cpu": model,
        "cpu_flags": [flag for flag in _CPU_FLAGS if flag in flags],
        "system": f"{platform.system()} {platform.release()}",
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("qconvert", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
