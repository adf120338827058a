"""If these fail, a bad plan reaches TensorRT, or its user is not told in one message what to do."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qrun.backends.trt import checks as plan_checks
from tests.commands import qrun, refused
from tests.emulated import tensorrt_rtx
from tests.emulated.device import EmulatedDevice
from tests.plans import edit_sidecar

COMMANDS = [("chat",), ("generate", "--prompt", "hi"), ("bench",)]


def refusals(path: Path, device: EmulatedDevice) -> str:
    """The one message of every command; none of them opens the plan, or changes a file beside it."""
    before = {file: file.read_bytes() for file in path.parent.rglob("*") if file.is_file()}
    messages = [refused(qrun(*command, "--engine", path)) for command in COMMANDS]
    assert len(set(messages)) == 1, messages
    assert messages[0].startswith("error: ")
    assert messages[0].count("what to do: ") == 1
    assert "Runtime.deserialize_cuda_engine" not in device.calls
    assert before == {file: file.read_bytes() for file in path.parent.rglob("*") if file.is_file()}
    device.check_nothing_left()
    return " ".join(messages[0].split())


def alter(plan: Path) -> None:
    content = bytearray(plan.read_bytes())
    content[-2] ^= 1
    plan.write_bytes(content)


def replace_by_onnx(plan: Path) -> None:
    shutil.copy(plan.with_name("model.standard.onnx"), plan)


def move_to_another_model(plan: Path) -> None:
    manifest = json.loads((plan.parent / "qconvert.json").read_text())
    for entry in manifest["files"]:
        entry["sha256"] = "0" * 64
    (plan.parent / "qconvert.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (alter, "model.plan is altered: its SHA-256 is not the sidecar's"),
        (replace_by_onnx, "model.plan is altered: "),
        (lambda plan: plan.write_bytes(b""), "model.plan is empty: 0 bytes, its sidecar says"),
        (lambda plan: plan.write_bytes(plan.read_bytes()[:-1]), "model.plan is truncated"),
        (lambda plan: plan.with_name("model.plan.json").unlink(), "model.plan has no sidecar"),
        (lambda plan: plan.with_name("model.plan.json").write_text("{"), "sidecar cannot be read"),
        (lambda plan: plan.with_name("qconvert.json").unlink(), "model.plan lies outside its model folder"),
        (move_to_another_model, "was built from another model than this folder's"),
        (lambda plan: plan.unlink(), "no such"),
    ],
)
def test_bytes_that_are_not_the_plans(
    plan: Path, device: EmulatedDevice, spoil: Callable[[Path], Any], message: str
) -> None:
    spoil(plan)
    assert message in refusals(plan, device)


@pytest.mark.parametrize(
    ("change", "message", "hint"),
    [
        (
            {"backend": "tensorrt", "library_version": "11.4.0"},
            "tensorrt_rtx is, and cannot open it",
            "build",
        ),
        ({"library_version": "1.6.0.5"}, "was built with TensorRT-RTX 1.6.0.5, and 1.7.1.116", "==1.6.0.5"),
        ({"compute_capabilities": ["12.0"]}, "this machine's GPU has 8.9", "--compute-capability 8.9"),
        ({"stripped": True}, "without its weights", "without --strip-weights"),
        ({"format_version": 2}, "format version 2", "pip install -U qconvert"),
    ],
)
def test_plans_for_others(
    *,
    plan: Path,
    device: EmulatedDevice,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    message: str,
    hint: str,
) -> None:
    monkeypatch.setattr(plan_checks, "find_spec", lambda name: object() if name == "tensorrt_rtx" else None)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    edit_sidecar(plan, lambda sidecar: sidecar.update(change))
    told = refusals(plan, device)
    assert message in told
    assert hint in told.partition("what to do: ")[2]


def test_no_tensorrt_is_installed(
    plan: Path, device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setattr(plan_checks, "find_spec", lambda name: None)
    told = refusals(plan, device)
    assert f"built with TensorRT-RTX {tensorrt_rtx.__version__}, and tensorrt_rtx is not installed" in told
    assert "pip install 'qconvert[rtx]'" in told


def test_no_cuda_bindings(plan: Path, device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    assert "the package cuda-bindings is missing" in refusals(plan, device)


def test_a_folder_named_as_a_plan(plan: Path, device: EmulatedDevice, tmp_path: Path) -> None:
    folder = tmp_path / "empty" / "x.plan"
    folder.mkdir(parents=True)
    assert "x.plan is not a folder that qconvert made" in refusals(folder, device)


def test_no_driver_is_not_called_an_old_one(
    plan: Path, device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA's own words for a machine with no driver at all: "driver version is insufficient"."""
    device.no_gpu = "cudaErrorInsufficientDriver"
    monkeypatch.setattr(
        "qrun.backends.trt.cuda.why_no_gpu", lambda: "there is no NVIDIA driver (libcuda.so.1)"
    )
    told = refusals(plan, device)
    assert "no NVIDIA GPU that can be used: there is no NVIDIA driver (libcuda.so.1)" in told
    assert "insufficient for" not in told
