"""A tiny folder for TensorRT with an emulated plan, and the device that runs it."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qconvert.export import ExportOptions, export
from qconvert.progress import Progress
from qrun.backends.trt.session import TrtSession
from tests.emulated.device import EmulatedDevice, use
from tests.emulated.plans import build_emulated_plan, install
from tests.tiny import make_tiny_checkpoint

LENGTH = 160
PROMPT_LENGTH = 16


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2; read-only."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="session")
def tiny_folder(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in bf16 for TensorRT with a cache of ``LENGTH`` tokens; read-only."""
    output = tmp_path_factory.mktemp("trt") / "model"
    options = ExportOptions(
        precision="bf16", target="tensorrt", max_length=LENGTH, output=output, verify=False
    )
    return export(str(tiny_checkpoint), options, Progress(quiet=True)).folder


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[EmulatedDevice]:
    """The GPU. At the end of a test no rule may have been broken, and nothing may be left on it."""
    emulated = EmulatedDevice()
    install(emulated, monkeypatch)
    real = TrtSession.forward

    def forward(self: TrtSession, *arguments: Any, **options: Any) -> np.ndarray:
        logits = real(self, *arguments, **options)
        emulated.check_readable(logits)
        return logits

    monkeypatch.setattr(TrtSession, "forward", forward)
    yield emulated
    try:
        assert emulated.violations == []
        if emulated.held or emulated.handles:
            gc.collect()
        emulated.check_nothing_left()
    finally:
        use(None)


@pytest.fixture
def make_plan(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Builds an emulated plan in a copy of the tiny folder."""

    def make(prompt_length: int = PROMPT_LENGTH, **settings: int) -> Path:
        folder = Path(shutil.copytree(tiny_folder, tmp_path / "model", dirs_exist_ok=True))
        return build_emulated_plan(folder, monkeypatch, prompt_length=prompt_length, **settings)

    return make


@pytest.fixture
def plan(make_plan: Callable[..., Path]) -> Path:
    return make_plan()
