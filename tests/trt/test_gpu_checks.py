"""If these fail, what waits for a GPU would fail there for reasons of its own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from qconvert.checkpoint.load import load_model, open_checkpoint
from qrun.backends.opening import open_session
from qrun.cli.bench import Workload
from tests.emulated.device import EmulatedDevice
from tests.gpu.checks import against_pytorch, exchanged_choices, greedy, open_plan, speed_and_memory
from tests.trt.conftest import LENGTH

PROMPT = list(range(40, 65))


def test_the_gpus_checks_pass_on_the_emulated_device(plan: Path, device: EmulatedDevice) -> None:
    with open_plan(plan) as session:
        assert exchanged_choices(session, open_session(plan.parent), PROMPT, 20) == []
        assert session.graph_state == "captured"
    with open_plan(plan, cuda_graph=False) as session:
        assert greedy(session, PROMPT, 8) == greedy(open_session(plan.parent), PROMPT, 8)


def test_the_gpus_checks_notice_another_model(plan: Path, device: EmulatedDevice) -> None:
    """The plan is fed other tokens than the CPU, as if its embedding were shifted by a row."""
    with open_plan(plan) as session:
        real = session.forward
        session.forward = lambda ids, *rest: real((ids + 1) % 320, *rest)  # type: ignore[method-assign]
        exchanges = exchanged_choices(session, open_session(plan.parent), PROMPT, 20)
        del session.forward
    assert max(exchange.margin for exchange in exchanges) > 0.5


def test_logits_are_compared_with_pytorch(plan: Path, tiny_checkpoint: Path, device: EmulatedDevice) -> None:
    model = load_model(open_checkpoint(tiny_checkpoint)).float()
    ids = np.random.default_rng(0).integers(0, 256, (1, 40))
    with open_plan(plan) as session:
        close = against_pytorch(session, model, ids, prompt=30)
        real = session.forward
        session.forward = lambda ids, *rest: real((ids + 1) % 320, *rest)  # type: ignore[method-assign]
        wrong = against_pytorch(session, model, ids, prompt=1)
        del session.forward
    assert close.position.tolist() == list(range(40))
    assert close.kl.mean() < 0.05
    assert close.kl.max() < 0.5
    assert wrong.kl.mean() > 1


def test_speed_and_memory_are_one_json_object(plan: Path, device: EmulatedDevice) -> None:
    result = speed_and_memory(plan, Workload(20, 8), repetitions=2, cuda_graph=True)
    assert json.loads(json.dumps(result))["cuda_graph"] == "captured"
    taken = result["device_bytes"]
    assert taken["with_cache"] - taken["weights_and_contexts"] == taken["kv_cache"]
    assert taken["kv_cache"] % LENGTH == 0
