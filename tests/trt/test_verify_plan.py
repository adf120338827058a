"""If these fail, ``qconvert verify model.plan`` passes a plan that computes something else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from qrun.backends.trt.session import TrtSession
from tests.emulated.device import EmulatedDevice
from tests.emulated.plans import build_emulated_plan
from tests.qconvert.building import TinyExports, refused, run


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random checkpoint, and a folder of it for TensorRT in bf16 with a cache of 128 tokens."""
    root = tmp_path_factory.mktemp("verified")
    folder = TinyExports(root)("bf16")
    return root / "checkpoint0", folder


@pytest.fixture
def plan(exported: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = Path(shutil.copytree(exported[1], tmp_path / "model"))
    return build_emulated_plan(folder, monkeypatch, prompt_length=64)


def verify(plan: Path, exported: tuple[Path, Path], *more: str):
    return run("verify", plan, "--reference", exported[0], "-q", *more)


def test_a_plan_passes_the_verification_on_the_paths_that_it_has(
    plan: Path, exported: tuple[Path, Path], device: EmulatedDevice
) -> None:
    manifest = (plan.parent / "qconvert.json").read_bytes()
    result = verify(plan, exported, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["device"] == "Emulated GPU, TensorRT-RTX 1.7.1.116"
    paths = {(path["case"], path["path"]) for path in report["cases"]}
    assert {
        ("short", "cut back, then token by token"),
        ("long", "last position only"),
        ("long", "in chunks, then token by token"),
        ("long", "token by token"),
        ("full", "to the last slot"),
    } <= paths
    assert not any("growing" in name or name == "whole" for _, name in paths)
    assert (plan.parent / "qconvert.json").read_bytes() == manifest


def test_a_plan_that_computes_something_else_fails(
    plan: Path, exported: tuple[Path, Path], device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = TrtSession.forward

    def wrong(self: TrtSession, token_ids: np.ndarray, cache: object, logits: str = "last") -> np.ndarray:
        """From the 40th token on, the plan reads another token than the one that it is given."""
        if cache.length >= 40:  # type: ignore[attr-defined]
            token_ids = (token_ids + 1) % 256
        return forward(self, token_ids, cache, logits)

    monkeypatch.setattr(TrtSession, "forward", wrong)
    result = verify(plan, exported)
    assert result.exit_code == 1
    assert "FAILED" in result.output


def test_what_cannot_be_verified_is_told_first(
    plan: Path, exported: tuple[Path, Path], device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(verify(plan, exported, "--write"), "--write is for folders")
    device.compute_capability = (12, 0)
    refused(verify(plan, exported), "this machine's GPU has 12.0", "--compute-capability 12.0")
    device.no_gpu = "cudaErrorNoDevice"
    refused(verify(plan, exported), "this machine has no NVIDIA GPU that can be used")
    (plan.parent / "model.onnx.data").write_bytes(b"")
    device.no_gpu = None
    device.compute_capability = (8, 9)
    refused(verify(plan, exported), "model.onnx.data is truncated")
