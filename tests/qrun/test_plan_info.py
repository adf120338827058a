"""If these fail, `qrun info` says of a plan what is not so, or promises that it runs here."""

from __future__ import annotations

import json
import shutil
import sys
import types
from pathlib import Path

import pytest

from qrun.backends.trt import checks as plan_checks
from qrun.backends.trt.cuda import Device
from qrun.errors import QrunError
from tests.commands import qrun, refused
from tests.plans import PLAN_BYTES, VERSION, edit_sidecar, make_plan_folder

KV_BYTES = 256 * 128


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    return make_plan_folder(tmp_path / "model")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """A machine with this TensorRT-RTX and this GPU."""

    def pretend(version: str = VERSION, capability: str = "8.9", memory: int = 24 << 30) -> None:
        module = types.ModuleType("tensorrt_rtx")
        module.__version__ = version  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", module)
        monkeypatch.setattr(plan_checks, "open_device", lambda: Device(0, "a GPU", capability, memory))
        monkeypatch.setattr(Device, "free_bytes", lambda self: self.total_bytes)

    return pretend


def here(path: Path) -> dict[str, object]:
    return json.loads(qrun("info", path, "--json").stdout)["here"]


def test_a_plan_a_sidecar_and_a_folder_tell_the_same(plan: Path, machine) -> None:
    machine()
    facts = json.loads(qrun("info", plan, "--json").stdout)
    assert facts == json.loads(qrun("info", plan.with_name("model.plan.json"), "--json").stdout)
    assert facts["kv_cache"] == {"dtype": "bfloat16", "bytes_per_token": 256, "bytes": KV_BYTES}
    assert (facts["plan_bytes"], facts["hashes_checked"]) == (len(PLAN_BYTES), False)
    assert facts["here"] == {"runs": True, "why_not": None, "what_to_do": None}

    assert json.loads(qrun("info", plan.parent, "--json").stdout)["engine"] is None
    manifest = json.loads((plan.parent / "qconvert.json").read_text())
    manifest["engine"] = {"file": "model.plan", "sidecar": "model.plan.json"}
    (plan.parent / "qconvert.json").write_text(json.dumps(manifest))
    folder = json.loads(qrun("info", plan.parent, "--json").stdout)
    assert folder["engine"] == facts
    assert "model.plan\n" in qrun("info", plan.parent).stdout


def test_people_read_it_in_80_columns(plan: Path, machine) -> None:
    machine(version="1.8.0.1")
    result = qrun("info", plan, "--check-hashes")
    assert result.exit_code == 0
    text = " ".join(result.stdout.split())
    for part in (
        "model fake, precision bf16",
        f"built with TensorRT-RTX {VERSION}; opens in this version only",
        "runs on GPUs of compute capability 8.9, 12.0",
        "profiles decode 1 token; prompt 1 to 128 tokens, tuned for 128",
        "KV cache bfloat16, 256 B per token, 33 kB for 128 tokens, allocated whole",
        "GPU memory 35 kB and a workspace: plan 2 kB, KV cache 33 kB",
        "bytes hash checked",
        f"here cannot run: the plan was built with TensorRT-RTX {VERSION}, and 1.8.0.1 is installed",
        "what to do build it anew: qconvert build",
    ):
        assert part in text, result.stdout
    lines = [line.replace(str(plan.parent), "FOLDER") for line in result.stdout.splitlines()]
    assert max(map(len, lines)) <= 80


def test_why_a_plan_cannot_run_here(plan: Path, machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(capability="8.6")
    assert "this machine's GPU has 8.6" in str(here(plan)["why_not"])
    machine(memory=10_000)
    assert "GB of GPU memory" in str(here(plan)["why_not"])

    def no_driver() -> None:
        raise QrunError("this machine has no NVIDIA GPU", hint="use another")

    monkeypatch.setattr(plan_checks, "open_device", no_driver)
    assert here(plan)["why_not"] == "this machine has no NVIDIA GPU"
    assert here(plan)["what_to_do"] == "use another"
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    assert "tensorrt_rtx is not installed" in str(here(plan)["why_not"])
    edit_sidecar(plan, lambda sidecar: sidecar.update(onnx={"model.onnx": "0" * 64}))
    assert "built from another model" in str(here(plan)["why_not"])


def test_broken_plans_are_refused(plan: Path) -> None:
    plan.write_bytes(PLAN_BYTES[:-1] + b"x")
    assert qrun("info", plan).exit_code == 0
    assert "model.plan is altered: its SHA-256" in refused(qrun("info", plan, "--check-hashes"))
    plan.write_bytes(b"")
    assert "model.plan is empty" in refused(qrun("info", plan))
    plan.with_name("model.plan.json").unlink()
    assert "model.plan has no sidecar" in refused(qrun("info", plan))
    plan.unlink()
    assert "no such" in refused(qrun("info", plan))


def test_a_plan_outside_its_folder_and_a_folder_named_as_one(plan: Path, tmp_path: Path) -> None:
    away = tmp_path / "away"
    away.mkdir()
    for name in ("model.plan", "model.plan.json"):
        shutil.copy(plan.with_name(name), away)
    assert "lies outside its model folder" in refused(qrun("info", away / "model.plan"))
    folder = tmp_path / "x.plan"
    folder.mkdir()
    assert "is not a folder that qconvert made" in refused(qrun("info", folder))
    renamed = plan.parent.rename(tmp_path / "model.of.plan")
    assert qrun("info", renamed).exit_code == 0


def test_options_that_a_plan_would_ignore_are_refused(plan: Path) -> None:
    for command in (("chat",), ("generate", "--prompt", "hi"), ("bench",)):
        message = refused(qrun(*command, "--engine", plan, "--device", "cpu"))
        assert "--device cpu has no meaning for a plan" in message
        assert str(plan.parent) in message
    assert "--threads has no meaning" in refused(qrun("chat", "--engine", plan, "--threads", 2))
