"""If these fail, a user of a plan sees another answer than from its folder, or a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import qrun as qrun_package
from qrun.backends.opening import open_session
from qrun.errors import QrunError
from tests.commands import qrun, refused
from tests.emulated import tensorrt_rtx
from tests.emulated.device import EmulatedDevice

TURNS = "hello\nand now?\n/reset\nhi\n"


def test_a_chat_over_a_plan_is_the_chat_over_its_folder(plan: Path, device: EmulatedDevice) -> None:
    """Three turns, one of them after a reset: prompts longer than the profile, decode steps, and trims."""
    options = ("--greedy", "--max-tokens", 12)
    on_gpu = qrun("chat", "--engine", plan, *options, stdin=TURNS)
    assert on_gpu.exit_code == 0, on_gpu.output
    on_cpu = qrun("chat", "--engine", plan.parent, *options, stdin=TURNS)
    assert on_gpu.stdout == on_cpu.stdout
    assert on_gpu.stdout.strip()
    assert device.graph_launches > 10


def test_a_conversation_keeps_its_cache_and_trims_what_changed(plan: Path, device: EmulatedDevice) -> None:
    texts = []
    for path in (plan, plan.parent):
        chat = qrun_package.open(path).chat(max_tokens=10, do_sample=False)
        *_, first = chat.send("hello")
        *_, second = chat.send("and now?")
        chat.system("short")  # rewrites the beginning: all turns are computed again
        *_, third = chat.send("why?")
        assert second.reused_tokens > 0
        assert third.reused_tokens < second.reused_tokens
        texts.append([answer.token_ids for answer in (first, second, third)])
        del chat
    assert texts[0] == texts[1]


def test_generate_and_bench_take_a_plan(plan: Path, device: EmulatedDevice) -> None:
    command = (
        "generate",
        "--prompt",
        "once upon a time",
        "--greedy",
        "--max-tokens",
        20,
        "--json",
        "--engine",
    )
    on_gpu, on_cpu = (json.loads(qrun(*command, path).stdout) for path in (plan, plan.parent))
    assert on_gpu["token_ids"] == on_cpu["token_ids"]
    assert len(on_gpu["token_ids"]) == 20
    result = qrun("bench", "--engine", plan, "-p", 20, "-n", 4, "-d", 8, "-r", 1, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["device"] == "Emulated GPU, TensorRT-RTX 1.7.1.116"


def test_several_rows_of_a_plan_or_its_folder_are_refused(plan: Path, device: EmulatedDevice) -> None:
    for engine, message in (
        (plan, "a plan runs one sequence at a time, not 2"),
        (plan.parent, "rows that could"),
    ):
        result = qrun("bench", "--engine", engine, "-p", 8, "-n", 4, "-r", 1, "--rows", 2)
        assert result.exit_code == 1
        assert message in result.output


def test_the_cuda_graph_can_be_left_out(plan: Path, device: EmulatedDevice) -> None:
    command = ("generate", "--engine", plan, "--prompt", "hi", "--greedy", "--max-tokens", 8, "--json")
    plain = json.loads(qrun(*command, "--no-cuda-graph").stdout)
    assert device.graph_launches == 0
    assert json.loads(qrun(*command).stdout)["token_ids"] == plain["token_ids"]
    assert device.graph_launches > 0


def test_verbose_tells_the_gpu(plan: Path, device: EmulatedDevice) -> None:
    result = qrun("generate", "--engine", plan, "--prompt", "hi", "--max-tokens", 1, "-v")
    assert "device: Emulated GPU, TensorRT-RTX 1.7.1.116" in result.stderr


def test_a_prompt_longer_than_the_cache_is_refused(plan: Path, device: EmulatedDevice) -> None:
    message = refused(qrun("generate", "--engine", plan, "--raw", "--prompt", "x" * 161))
    assert "the prompt has 161 tokens, the model's context is 160" in message


@pytest.mark.parametrize("error", ["cudaErrorNoDevice", "cudaErrorInsufficientDriver"])
def test_no_gpu_or_no_driver_is_one_message(plan: Path, device: EmulatedDevice, error: str) -> None:
    device.no_gpu = error
    message = refused(qrun("chat", "--engine", plan, stdin="hi\n"))
    assert "this machine has no NVIDIA GPU that can be used" in message
    assert error in message
    assert "what to do" in message


def test_another_gpu_than_the_plans_is_told_before_it_is_opened(plan: Path, device: EmulatedDevice) -> None:
    device.compute_capability = (12, 0)
    message = refused(qrun("chat", "--engine", plan, stdin="hi\n"))
    assert "built for compute capability 8.9" in message
    assert "Runtime.deserialize_cuda_engine" not in device.calls


@pytest.mark.parametrize(
    ("settings", "total", "message"),
    [
        ({}, 50_000, "plan needs"),
        ({"scratch": 30_000_000}, 20_000_000, "workspace 0.06 GB"),
    ],
    ids=["the cache", "the workspace"],
)
def test_too_little_memory_is_forecast_before_anything_is_taken(
    make_plan: Callable[..., Path], device: EmulatedDevice, settings: dict[str, int], total: int, message: str
) -> None:
    plan = make_plan(**settings)
    device.total_bytes = total
    told = refused(qrun("chat", "--engine", plan, stdin="hi\n"))
    assert message in told
    assert "free GPU memory" in told
    device.check_nothing_left()


def test_memory_that_others_took_meanwhile_is_told(plan: Path, device: EmulatedDevice) -> None:
    session = open_session(plan)
    device.total_bytes = device.used_bytes() + 1000
    with pytest.raises(QrunError, match=r"KV cache of 160 tokens needs .* GB of the GPU's memory"):
        session.forward(np.ones((1, 1), dtype=np.int64), session.new_cache())
    device.total_bytes += 10_000_000
    assert session.forward(np.ones((1, 1), dtype=np.int64), session.new_cache()).shape == (1, 1, 320)


def test_a_plan_that_tensorrt_cannot_open_tells_its_words(
    make_plan: Callable[..., Path], device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan()
    monkeypatch.setattr(tensorrt_rtx, "MAGIC", b"another")
    message = refused(qrun("chat", "--engine", plan, stdin="hi\n"))
    assert "TensorRT-RTX 1.7.1.116 cannot open the plan:\n  Serialization assertion" in message
    device.check_nothing_left()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("get_aliased_input_tensor", None), "it does not write present.0.key where past_key_values.0.key"),
        (("get_tensor_location", tensorrt_rtx.TensorLocation.HOST), "it wants input_ids, position_ids"),
        (("get_tensor_dtype", tensorrt_rtx.DataType.HALF), "its input_ids, logits"),
        (("get_tensor_profile_shape", [tensorrt_rtx.Dims([1, 2])] * 3), "its optimisation profiles differ"),
    ],
)
def test_an_engine_that_is_not_what_its_sidecar_says_is_refused(
    plan: Path,
    device: EmulatedDevice,
    monkeypatch: pytest.MonkeyPatch,
    change: tuple[str, object],
    message: str,
) -> None:
    """A cache that is not written in place would be read stale, and nothing would tell."""
    method, answer = change
    monkeypatch.setattr(tensorrt_rtx.ICudaEngine, method, lambda *_: answer)
    told = refused(qrun("chat", "--engine", plan, stdin="hi\n"))
    assert f"model.plan is not what its sidecar says: {message}" in told
    device.check_nothing_left()
