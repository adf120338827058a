"""If these fail, a machine that cannot build a plan does not say what is missing and what to do."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qconvert.export import ExportOptions, export
from qconvert.tensorrt import backends
from tests.qconvert.building import QUIET, TinyExports, names, needs_rtx, no_gpu, refused, run
from tests.tiny import make_tiny_checkpoint


@no_gpu
@needs_rtx
def test_rtx_without_gpu_must_be_told_what_to_build_for(folder: Path) -> None:
    for arguments in ([], ["--backend", "rtx"]):
        refused(
            run("build", folder, *arguments), "no compute capability is named", "--compute-capability 8.9"
        )
    refused(
        run("build", folder, "--compute-capability", "9.9"),
        "cannot build for compute capability 9.9", "use one of 7.5, 8.0, 8.6, 8.9, 12.0",
    )  # fmt: skip
    assert "model.plan" not in names(folder)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend that only the given modules are installed."""

    def pretend(*modules: str) -> None:
        def load(name: str) -> Any:
            if name not in modules:
                raise ModuleNotFoundError(f"No module named '{name}'", name=name)
            return type(sys)(name)

        monkeypatch.setattr(backends.importlib, "import_module", load)

    return pretend


def test_nothing_is_installed(folder: Path, installed: Callable[..., None]) -> None:
    installed()
    refused(
        run("build", folder), "tensorrt is not installed", "tensorrt_rtx is not installed", "qconvert[rtx]"
    )
    refused(run("build", folder, "--backend", "tensorrt"), "tensorrt is not installed", "qconvert[tensorrt]")


@no_gpu
def test_tensorrt_is_installed_and_there_is_no_gpu(folder: Path, installed: Callable[..., None]) -> None:
    installed("tensorrt")
    refused(run("build", folder, "--backend", "tensorrt"), "tensorrt needs a GPU to build", "--backend rtx")
    refused(
        run("build", folder, "--backend", "tensorrt", "--compute-capability", "8.9"),
        "for the GPU of this machine only",
    )


def test_the_choice_is_told(installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "why_no_gpu", lambda: None)
    installed("tensorrt", "tensorrt_rtx")
    assert backends.choose_backend(None, ()).name == "tensorrt"
    installed("tensorrt_rtx")
    chosen = backends.choose_backend(None, ())
    assert chosen.name == "rtx"
    assert "tensorrt is not installed" in chosen.reason


def test_folders_that_cannot_be_built(exported: TinyExports, tmp_path: Path) -> None:
    refused(run("build", exported("fp32")), "no attention kernel in float32", "--precision bf16")
    refused(run("build", tmp_path / "nowhere"), "no such model folder")
    checkpoint = make_tiny_checkpoint(tmp_path / "c")
    other = export(
        str(checkpoint), ExportOptions(precision="int8", output=tmp_path / "o", verify=False), QUIET
    )
    refused(run("build", other.folder), 'exported for "onnxruntime"', "--target tensorrt")
