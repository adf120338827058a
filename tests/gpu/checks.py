"""What is asked of a plan on a GPU, as functions: ``tests/trt`` runs them on the emulated device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from qconvert.proof.compare import Rows, compare_rows
from qconvert.proof.limits import limit_value
from qrun.backends.opening import open_session
from qrun.backends.session import Session
from qrun.backends.trt import cuda
from qrun.backends.trt.session import TrtSession
from qrun.cli.bench import Measured, Workload, conditions, measure
from qrun.decoding.generate import Context, Token, generate
from qrun.sampling.params import SamplingParams

# The CPU's margin, in logits, between its choice and another of the plan's. Both compute in bfloat16 with
# other orders of sums, so this is the verification's own limit for bf16.
NEAR_TIE = limit_value("near_tie", "bf16")


def open_plan(plan: Path, *, cuda_graph: bool = True) -> TrtSession:
    session = open_session(plan, cuda_graph=cuda_graph)
    assert isinstance(session, TrtSession)
    return session


def greedy(session: Session, prompt: list[int], count: int) -> list[int]:
    """The most likely tokens after a prompt, past any end token."""
    params = SamplingParams(max_tokens=count, ignore_eos=True)
    return [e.token_id for e in generate(Context(session), prompt, params) if isinstance(e, Token)]


@dataclass(frozen=True)
class Exchange:
    """A position at which the plan's first choice is another: the CPU's margin between the two, in logits."""

    position: int
    margin: float


def exchanged_choices(plan: Session, cpu: Session, prompt: list[int], count: int) -> list[Exchange]:
    """Feed both with the CPU's greedy tokens, step by step, and compare their first choices."""
    ids = np.array([prompt + greedy(cpu, prompt, count)], dtype=np.int64)
    caches = plan.new_cache(), cpu.new_cache()
    exchanges, start = [], 0
    for stop in range(len(prompt), ids.shape[1]):
        ours, theirs = (
            session.forward(ids[:, start:stop], cache)[0, 0].copy()
            for session, cache in zip((plan, cpu), caches)
        )
        assert np.isfinite(ours).all(), f"position {stop - 1} has logits that are not numbers"
        if (choice := ours.argmax()) != theirs.argmax():
            exchanges.append(Exchange(stop - 1, float(theirs.max() - theirs[choice])))
        start = stop
    return exchanges


def against_pytorch(session: Session, model: Any, ids: np.ndarray, *, prompt: int) -> Rows:
    """All logits of a text against PyTorch's: ``prompt`` tokens whole, the rest token by token.

    Args:
        session: of the plan.
        model: transformers' own, in float32.
        ids: int64 ``[1, tokens]``.
        prompt: tokens of the first call.
    """
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits[0].float()
    cache = session.new_cache()
    pieces = [session.forward(ids[:, :prompt], cache, "all")[0].copy()]
    pieces += [
        session.forward(ids[:, at : at + 1], cache, "all")[0].copy() for at in range(prompt, ids.shape[1])
    ]
    ours = torch.from_numpy(np.concatenate(pieces))
    return compare_rows(0, expected, ours, torch.from_numpy(ids[0, 1:]))


def speed_and_memory(plan: Path, workload: Workload, *, repetitions: int, cuda_graph: bool) -> dict[str, Any]:
    """One result for ``benchmarks/results``: rates of a workload, and the bytes taken of the GPU."""
    before = cuda.open_device().free_bytes()
    started = perf_counter()
    with open_plan(plan, cuda_graph=cuda_graph) as session:
        load_seconds = perf_counter() - started
        opened = session.gpu.free_bytes()
        measured: Measured | None = None
        for each in measure(session, workload, repetitions=repetitions):
            measured = each
            running = session.gpu.free_bytes()
        assert measured is not None
        return {
            **conditions(session, load_seconds),
            "compute_capability": session.gpu.compute_capability,
            "cuda_graph": session.graph_state,
            "plan_bytes": plan.stat().st_size,
            "device_bytes": {
                "weights_and_contexts": before - opened,
                "with_cache": before - running,
                "kv_cache": session.manifest.kv.bytes_per_token * session.manifest.model.context_length,
            },
            "results": measured.to_json(),
        }
