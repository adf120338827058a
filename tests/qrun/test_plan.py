"""If these fail, a plan is deserialised that this machine cannot run, or whose bytes were not checked."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from qrun.backends.trt import checks as plan_checks
from qrun.backends.trt.checks import check_device_memory, check_runnable, load_backend_module
from qrun.errors import QrunError
from qrun.folder.manifest import find_model_folder, read_manifest
from qrun.folder.plan import Profile, Tensor, read_plan
from tests.plans import PLAN_BYTES, VERSION, edit_sidecar, make_plan_folder


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    return make_plan_folder(tmp_path / "model")


def refusal(call: Any, *arguments: Any) -> str:
    with pytest.raises(QrunError) as caught:
        call(*arguments)
    assert caught.value.hint, f"it does not say what to do: {caught.value}"
    return str(caught.value)


def test_a_sidecar_is_read_as_it_was_written(plan: Path) -> None:
    facts = read_plan(plan)
    assert facts == read_plan(plan.with_name("model.plan.json"))
    assert (facts.path, facts.folder) == (plan, plan.parent)
    assert (facts.backend, facts.title) == ("rtx", f"TensorRT-RTX {VERSION}")
    assert facts.compute_capabilities == ("8.9", "12.0")
    assert facts.profiles == (Profile("decode", 1, 1, 1), Profile("prompt", 1, 128, 128))
    assert facts.inputs[3] == Tensor("past_key_values.0.key", "bfloat16", (-1, 2, 128, 16))
    assert facts.outputs[0] == Tensor("logits", "float32", (-1, -1, 320))
    assert facts.aliases["present.1.value"] == "past_key_values.1.value"
    facts.check_bytes()
    facts.check_belongs(read_manifest(plan))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format",), "onnx", 'is not ours: "format" is not "qconvert-plan"'),
        (("format_version",), 2, "format version 2; this qrun reads up to 1"),
        (("backend",), "openvino", "\"backend\" is 'openvino', not one of tensorrt, rtx"),
        (("library_version",), None, '"library_version" is missing'),
        (("stripped",), "no", "\"stripped\" is 'no', not of type bool"),
        (("compute_capabilities",), [8.9], "not a list of strings"),
        (("cache_length",), 0, '"cache_length" is 0, not a positive number'),
        (("aliases", "present.0.key"), 3, '"aliases" holds something that is not a string'),
        (("profiles", 1, "most"), 7, "lengths that do not rise: [1, 128, 7]"),
        (("inputs", 0), "input_ids", '"shape" is missing'),
        (("inputs", 0, "shape"), [-2], '"shape" is [-2]'),
        (("inputs", 0, "dtype"), "int4", "\"dtype\" is 'int4', not one of"),
        (("plan", "file"), "../model.plan", "names a path outside the model folder: '../model.plan'"),
        (("plan", "file"), "/model.plan", "names a path outside the model folder"),
        (("plan", "file"), "other.plan", "\"plan.file\" is 'other.plan', and the plan beside it is"),
    ],
)
def test_what_is_not_understood_is_refused(plan: Path, path: tuple, value: Any, message: str) -> None:
    def edit(sidecar: dict[str, Any]) -> None:
        where: Any = sidecar
        for key in path[:-1]:
            where = where[key]
        where[path[-1]] = value

    edit_sidecar(plan, edit)
    assert message in refusal(read_plan, plan)


def test_a_malformed_sidecar(plan: Path) -> None:
    plan.with_name("model.plan.json").write_text('{"format"')
    assert "the plan's sidecar cannot be read" in refusal(read_plan, plan)


def test_a_plan_without_its_sidecar(plan: Path) -> None:
    plan.with_name("model.plan.json").unlink()
    message = refusal(read_plan, plan)
    assert "model.plan has no sidecar" in message
    assert f"qconvert build {plan.parent}" in message


def test_what_is_no_plan(plan: Path) -> None:
    folder = plan.parent / "x.plan"
    folder.mkdir()
    assert "x.plan is a folder and not a plan" in refusal(read_plan, folder)
    assert "no such plan" in refusal(read_plan, plan.with_name("other.plan"))
    shutil.copy(plan.with_name("model.onnx"), plan)
    assert "model.plan is truncated: 10 bytes" in refusal(read_plan, plan)
    plan.write_bytes(b"")
    assert "model.plan is empty: 0 bytes" in refusal(read_plan, plan)


def test_altered_bytes_are_found_before_anything_is_deserialised(plan: Path) -> None:
    plan.write_bytes(PLAN_BYTES + b"x")
    assert "model.plan is altered" in refusal(read_plan, plan)
    plan.write_bytes(PLAN_BYTES[:-1] + b"x")
    read: list[int] = []
    message = refusal(read_plan(plan).check_bytes, lambda name, count: read.append(count))
    assert "model.plan is altered: its SHA-256 is not the sidecar's" in message
    assert sum(read) == len(PLAN_BYTES)


def test_a_plan_in_another_place(plan: Path, tmp_path: Path) -> None:
    """Outside any model folder, and in the folder of another model."""
    away = tmp_path / "away"
    away.mkdir()
    for name in ("model.plan", "model.plan.json"):
        shutil.copy(plan.with_name(name), away)
    message = refusal(find_model_folder, away / "model.plan")
    assert "model.plan lies outside its model folder: there is no qconvert.json beside it" in message

    manifest = json.loads((plan.parent / "qconvert.json").read_text())
    manifest["files"][0]["sha256"] = "0" * 64
    for entry in manifest["files"]:
        entry["sha256"] = "0" * 64
    (away / "qconvert.json").write_text(json.dumps(manifest))
    facts = read_plan(away / "model.plan")
    message = refusal(facts.check_belongs, read_manifest(away))
    assert "was built from another model than this folder's" in message


# The library, its version and the GPU


def test_the_backend_is_not_installed(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setattr(plan_checks, "find_spec", lambda name: None)
    message = refusal(load_backend_module, read_plan(plan))
    assert f"built with TensorRT-RTX {VERSION}, and tensorrt_rtx is not installed\n" in message
    assert "pip install 'qconvert[rtx]'" in message


def test_only_the_other_backend_is_installed(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setattr(plan_checks, "find_spec", lambda name: object() if name == "tensorrt" else None)
    message = refusal(load_backend_module, read_plan(plan))
    assert "tensorrt_rtx is not installed; tensorrt is, and cannot open it" in message
    assert f"qconvert build {plan.parent} --backend tensorrt" in message


def test_the_backend_is_installed_and_broken(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise ImportError("libtensorrt_rtx.so: cannot open shared object file")

    monkeypatch.setattr(plan_checks, "import_module", broken)
    assert "tensorrt_rtx cannot be loaded: libtensorrt_rtx.so" in refusal(
        load_backend_module, read_plan(plan)
    )


def test_another_version(plan: Path) -> None:
    message = refusal(check_runnable, read_plan(plan), "1.8.0.1", "8.9")
    assert f"built with TensorRT-RTX {VERSION}, and 1.8.0.1 is installed" in message
    assert f"qconvert build {plan.parent} --backend rtx" in message
    assert f"pip install tensorrt-rtx=={VERSION}" in message


def test_another_compute_capability(plan: Path) -> None:
    message = refusal(check_runnable, read_plan(plan), VERSION, "8.6")
    assert "built for compute capability 8.9, 12.0, and this machine's GPU has 8.6" in message
    assert f"qconvert build {plan.parent} --backend rtx --compute-capability 8.6" in message
    check_runnable(read_plan(plan), VERSION, "12.0")


def test_compatible_plans_open_elsewhere_and_no_further(plan: Path) -> None:
    edit_sidecar(plan, lambda s: s.update(backend="tensorrt", library_version="11.4.0"))
    assert "11.5.0 is installed" in refusal(check_runnable, read_plan(plan), "11.5.0", "8.9")
    edit_sidecar(plan, lambda s: s.update(version_compatible=True, hardware_compatible=True))
    facts = read_plan(plan)
    check_runnable(facts, "11.10.0", "9.0")
    assert "11.3.9 is installed" in refusal(check_runnable, facts, "11.3.9", "9.0")
    assert "this machine's GPU has 7.5" in refusal(check_runnable, facts, "11.4.0", "7.5")


def test_a_plan_without_weights(plan: Path) -> None:
    edit_sidecar(plan, lambda s: s.update(stripped=True))
    assert "without its weights" in refusal(check_runnable, read_plan(plan), VERSION, "8.9")


def test_too_little_device_memory_is_told_with_the_forecast(plan: Path) -> None:
    facts, manifest = read_plan(plan), read_manifest(plan)
    needed = len(PLAN_BYTES) + 256 * 128
    check_device_memory(facts, manifest, needed)
    message = refusal(check_device_memory, facts, manifest, needed - 1)
    assert "GB of GPU memory" in message
    assert "KV cache of 128 tokens" in message
    assert "--max-length" in message
    assert "workspace 1.00 GB" in refusal(check_device_memory, facts, manifest, needed, 10**9)
