"""How fast a model folder runs on this machine, measured through the loop that ``generate`` uses."""

from __future__ import annotations

import platform
import resource
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Sequences
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean, median
from time import perf_counter
from typing import Any

import numpy as np

from qrun.backends.session import Session
from qrun.decoding.draft import Draft
from qrun.decoding.generate import Context, generate
from qrun.decoding.scheduler import PREFILL_CHUNK, Scheduler
from qrun.decoding.sequence import Finished, Sequence, Token
from qrun.decoding.slots import Slots
from qrun.decoding.speculation import new_speculation
from qrun.errors import QrunError
from qrun.folder.manifest import Manifest
from qrun.sampling.params import SamplingParams

_CPU_FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm")


@dataclass(frozen=True)
class Workload:
    """One thing to measure: a prompt after ``depth`` cached tokens, then greedy generation; in tokens.

    With several ``rows`` it is so many prompts and answers at once, each of these lengths.
    """

    prompt_tokens: int
    generated_tokens: int
    depth: int = 0
    rows: int = 1


@dataclass(frozen=True)
class Round:
    """One repetition. Prefill counts new prompt tokens; decode counts steps after the first token.

    Several rows: prompts are read one after the other while the answers before them go on, so that
    prefill ends with the last first token; decode counts tokens of all rows together; a row waits for its
    first token for ``first_token_seconds`` on average.

    ``guessed`` tokens were tried in steps of several, and ``accepted`` of them came true.
    """

    prefill_seconds: float
    decode_seconds: float
    first_token_seconds: float
    guessed: int = 0
    accepted: int = 0


@dataclass(frozen=True)
class Measured:
    """A workload and its rounds."""

    workload: Workload
    rounds: tuple[Round, ...]

    def prefill_rates(self) -> list[float]:
        """Prompt tokens per second, of all rows together, round by round."""
        tokens = self.workload.rows * self.workload.prompt_tokens
        return [tokens / each.prefill_seconds for each in self.rounds]

    def decode_rates(self) -> list[float]:
        """Generated tokens per second, of all rows together, round by round; empty for one token a row."""
        steps = self.workload.generated_tokens - 1
        return [self.workload.rows * steps / each.decode_seconds for each in self.rounds] if steps else []

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
            "seconds_per_output_token": self.workload.rows / median(decode) if decode else None,
            "time_to_first_token": median(each.first_token_seconds for each in self.rounds),
            "guessed_tokens": median(each.guessed for each in self.rounds),
            "accepted_tokens": median(each.accepted for each in self.rounds),
        }


def measure(
    session: Session,
    workload: Workload,
    *,
    repetitions: int,
    chunk: int = PREFILL_CHUNK,
    speculate: bool = False,
    draft: Draft | None = None,
) -> Iterator[Measured]:
    """Run a workload once to warm up and then ``repetitions`` times; yields after each counted round.

    The prompt is random token ids: speed does not depend on them. Every round begins with the same cache of
    ``depth`` tokens, and end tokens are ignored.

    Raises:
        QrunError: the workload does not fit into the model's context.
    """
    _check(session.manifest, workload, chunk, speculate=speculate)
    one_round: Callable[[], Round]
    if workload.rows == 1:
        one_round = _Alone(session, workload, chunk, speculate=speculate, draft=draft)
    else:
        one_round = _Together(session, workload, chunk, speculate=speculate)
    rounds: list[Round] = []
    for number in range(repetitions + 1):
        found = one_round()
        if number > 0:  # the first round allocates memory that the later ones use again
            rounds.append(found)
            yield Measured(workload, tuple(rounds))


class _Alone:
    """A round with one row, through ``generate``."""

    def __init__(
        self, session: Session, workload: Workload, chunk: int, *, speculate: bool, draft: Draft | None
    ) -> None:
        self._workload, self._chunk = workload, chunk
        self._ids = _prompts(workload, session, *(() if draft is None else (draft.session,)))[0]
        self._context = Context(session, speculate=speculate, draft=draft)
        _fill(self._context.slots, [self._ids], workload.depth, chunk)

    def __call__(self) -> Round:
        workload, context = self._workload, self._context
        context.slots.trim(0, workload.depth)
        params = SamplingParams(max_tokens=workload.generated_tokens, ignore_eos=True)
        started, first, last = perf_counter(), 0.0, None
        for event in generate(context, self._ids, params, chunk=self._chunk):
            last = event
            if first == 0.0 and isinstance(event, Token):
                first = perf_counter() - started
        assert isinstance(last, Finished), "the loop ends with its summary"
        assert last.completion_tokens == workload.generated_tokens
        guesses = last.guessed_tokens, last.accepted_tokens
        return Round(last.prefill_seconds, last.decode_seconds, first, *guesses)


class _Together:
    """A round with several rows, through the scheduler: all prompts, then steps in which all rows decode."""

    def __init__(self, session: Session, workload: Workload, chunk: int, *, speculate: bool) -> None:
        self._workload, self._chunk = workload, chunk
        self._speculation = new_speculation(session, None, speculate=speculate)
        self._limit = session.manifest.model.context_length
        self._ids = _prompts(workload, session)
        self._slots = Slots(session, workload.rows)
        _fill(self._slots, self._ids, workload.depth, chunk)

    def __call__(self) -> Round:
        workload, slots = self._workload, self._slots
        for row in range(workload.rows):
            slots.trim(row, workload.depth)
        scheduler = Scheduler(slots, chunk=self._chunk, grain=None, speculation=self._speculation)
        sequences = [Sequence(ids, SamplingParams(ignore_eos=True), self._limit) for ids in self._ids]
        for sequence in sequences:
            scheduler.add(sequence)
        started, firsts = perf_counter(), list[float]()
        while len(firsts) < workload.rows:
            scheduler.step()
            begun = sum(bool(sequence.token_ids) for sequence in sequences)
            firsts += [perf_counter() - started] * (begun - len(firsts))
        decoding, before = perf_counter(), sum(len(sequence.token_ids) for sequence in sequences)
        wanted, found = workload.rows * (workload.generated_tokens - 1), 0
        while found < wanted:
            scheduler.step()
            found = sum(len(sequence.token_ids) for sequence in sequences) - before
        # A last step of several tokens may give more than were asked for.
        seconds = (perf_counter() - decoding) * wanted / max(found, 1)
        guessed = sum(sequence.guessed for sequence in sequences)
        accepted = sum(sequence.accepted for sequence in sequences)
        assert all(sequence.finish_reason is None for sequence in sequences), "the context has room for all"
        for sequence in sequences:
            sequence.cancel()
        scheduler.step()
        return Round(decoding - started, seconds, fmean(firsts), guessed, accepted)


def _prompts(workload: Workload, *sessions: Session) -> list[list[int]]:
    """Random tokens that all of the models know."""
    vocab_size = min(session.manifest.model.vocab_size for session in sessions)
    total = workload.depth + workload.prompt_tokens
    shape = (workload.rows, total)
    found: list[list[int]] = np.random.default_rng(0).integers(0, vocab_size, shape).tolist()
    return found


def _fill(slots: Slots, prompts: Sequences[list[int]], depth: int, chunk: int) -> None:
    for row, ids in enumerate(prompts):
        for start in range(0, depth, chunk):
            slots.feed(row, ids[start : min(start + chunk, depth)], logits="none")


def workloads(
    prompts: Sequences[int], generated: Sequences[int], depths: Sequences[int], rows: Sequences[int] = (1,)
) -> list[Workload]:
    """Every combination, in the order given."""
    return [
        Workload(prompt, new, depth, count)
        for depth in depths
        for prompt in prompts
        for new in generated
        for count in rows
    ]


def conditions(session: Session, load_seconds: float, draft: Draft | None = None) -> dict[str, Any]:
    """What a figure depends on: machine, versions, model and device; ``peak_rss_bytes`` is this process's."""
    models = {"model": session, **({} if draft is None else {"draft": draft.session})}
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": _machine(),
        "device": session.device,
        "versions": _versions(),
        **{name: _model(each) for name, each in models.items()},
        "load_seconds": load_seconds,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def peak_rss_bytes() -> int:
    """The largest resident set of this process so far, mapped files included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def _check(manifest: Manifest, workload: Workload, chunk: int, *, speculate: bool) -> None:
    for name, value in asdict(workload).items():
        if value < (0 if name == "depth" else 1):
            raise QrunError(f"{name} is {value}", hint="give a positive number")
    # The last generated token is sampled and never fed.
    needed = workload.depth + workload.prompt_tokens + workload.generated_tokens - 1
    if workload.rows > 1:  # the first row decodes while the others' prompts are read, and does not end
        pieces = (workload.depth + workload.prompt_tokens - 1) // chunk - workload.depth // chunk + 1
        needed += (workload.rows - 1) * pieces + 1
        if speculate:  # a row may get the tokens of others before them
            needed += (workload.rows - 1) * workload.generated_tokens + 16
    if needed > manifest.model.context_length:
        rows = f" in {workload.rows} rows" if workload.rows > 1 else ""
        raise QrunError(
            f"depth {workload.depth:,}, prompt {workload.prompt_tokens:,} and {workload.generated_tokens:,} "
            f"generated tokens{rows} exceed the context of {manifest.model.context_length:,}",
            hint="measure shorter lengths",
        )


def _model(session: Session) -> dict[str, Any]:
    return {"name": session.manifest.name, "precision": session.manifest.precision, **_identity(session)}


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
