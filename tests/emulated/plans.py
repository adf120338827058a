"""Plans for the emulated device: the product's own build, with another builder in the real one's place."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from qconvert.progress import Progress
from qconvert.tensorrt import plan as engine
from qconvert.tensorrt.backends import Backend
from qconvert.tensorrt.build import BuilderSettings, Built
from tests.emulated import cuda_runtime, tensorrt_rtx
from tests.emulated.device import EmulatedDevice, use
from tests.emulated.graph import StandardGraph

_TYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64", "INT32": "int32"}


def build_emulated_plan(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, prompt_length: int = 16, **settings: int
) -> Path:
    """``model.plan`` and its sidecar in a folder for TensorRT.

    Args:
        prompt_length: tokens at once on the prompt profile.
        settings: ``positions``, how many logits that profile computes at once; ``scratch`` and ``weights``,
            bytes that a context and the engine take.
    """
    backend = Backend("rtx", tensorrt_rtx, ("8.9",), "emulated")

    def build_plan(
        backend: Backend, graph: Path, chosen: BuilderSettings, output: BinaryIO, advance: Callable[..., None]
    ) -> Built:
        profiles = [asdict(profile) for profile in chosen.profiles]
        header = {"folder": str(folder), "profiles": profiles, **settings}
        content = tensorrt_rtx.MAGIC + json.dumps(header).encode()
        output.write(content)
        return Built(len(content), hashlib.sha256(content).hexdigest(), *_described(folder))

    monkeypatch.setattr(engine, "choose_backend", lambda *_: backend)
    monkeypatch.setattr(engine, "build_plan", build_plan)
    options = engine.BuildOptions(compute_capabilities=("8.9",), prompt_length=prompt_length)
    return engine.build(folder, options, Progress(quiet=True)).path


def install(device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the doubles where qrun imports the real modules from."""
    use(device)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", tensorrt_rtx)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda_runtime)


def _described(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    graph = StandardGraph(folder / "model.standard.onnx")
    inputs, outputs = (
        [
            {
                "name": name,
                "shape": list(graph.tensors[name].shape),
                "dtype": _TYPES[graph.tensors[name].kind],
            }
            for name in names
        ]
        for names in (graph.inputs, graph.outputs)
    )
    return inputs, outputs
