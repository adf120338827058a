"""Tiny folders for TensorRT, the commands on them, and ways to break a graph; used by the tests of builds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from click.testing import CliRunner, Result

from qconvert.cli import main
from qconvert.export import ExportOptions, export
from qconvert.progress import Progress
from qconvert.tensorrt import backends
from qconvert.tensorrt.plan import BuildOptions
from tests.tiny import make_tiny_checkpoint

QUIET = Progress(quiet=True)
FOR_89 = BuildOptions(compute_capabilities=("8.9",))
LENGTH = 128
needs_rtx = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed (pip install 'qconvert[rtx]')"
)
no_gpu = pytest.mark.skipif(backends.why_no_gpu() is None, reason="this machine has a GPU, and would use it")


class TinyExports:
    """Exports a tiny model once for each precision and kind; the folders are to be copied before a change."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._made: dict[Any, Path] = {}

    def __call__(self, precision: str, **settings: Any) -> Path:
        key = (precision, *settings.items())
        if key not in self._made:
            number = len(self._made)
            checkpoint = make_tiny_checkpoint(self._root / f"checkpoint{number}", **settings)
            output = self._root / f"model{number}"
            options = ExportOptions(
                precision=precision, target="tensorrt", max_length=LENGTH, output=output, verify=False
            )
            self._made[key] = export(str(checkpoint), options, QUIET).folder
        return self._made[key]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(result: Result, *parts: str) -> None:
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), result.exception  # anything else is a traceback
    for part in parts:
        assert part in " ".join(result.output.split()), result.output


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def edit_graph(folder: Path, edit: Callable[[ir.Model], None]) -> None:
    """Change the builder's graph, and the manifest with it, so that nothing but the graph is wrong."""
    path = folder / "model.onnx"
    model = ir.load(path)
    edit(model)
    path.unlink()
    ir.save(model, path)
    manifest = json.loads((folder / "qconvert.json").read_text())
    for entry in manifest["files"]:
        if entry["path"] == "model.onnx":
            content = path.read_bytes()
            entry.update(size=len(content), sha256=hashlib.sha256(content).hexdigest())
    (folder / "qconvert.json").write_text(json.dumps(manifest))


def dynamic_cache(model: ir.Model) -> None:
    for value in [*model.graph.inputs, *model.graph.outputs]:
        if value.name and value.name.startswith(("past", "present")):
            value.shape = ir.Shape(("batch", 2, "length", 16))
