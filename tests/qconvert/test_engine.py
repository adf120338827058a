"""If these fail, TensorRT refuses what we export, or a plan appears that says of itself what is not so."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from qconvert.tensorrt import plan as engine
from qconvert.tensorrt.plan import BuildOptions, build
from qrun.folder.manifest import read_manifest
from tests.qconvert.building import (
    FOR_89,
    LENGTH,
    QUIET,
    TinyExports,
    dynamic_cache,
    edit_graph,
    names,
    needs_rtx,
    refused,
    run,
)


@needs_rtx
@pytest.mark.parametrize(
    ("precision", "settings"),
    [
        ("bf16", {}),
        ("fp16", {}),
        ("int4", {}),
        ("bf16", {"tie_word_embeddings": False}),
        ("bf16", {"sliding": True}),
        ("bf16", {"yarn": True}),
    ],
    ids=["bf16", "fp16", "int4", "untied", "sliding", "yarn"],
)
def test_the_real_parser_and_builder_take_our_graph(
    exported: TinyExports, tmp_path: Path, precision: str, settings: dict[str, Any]
) -> None:
    folder = Path(shutil.copytree(exported(precision, **settings), tmp_path / "model"))
    facts = build(folder, FOR_89, QUIET).facts
    assert facts["plan"]["size"] == (folder / "model.plan").stat().st_size > 100_000
    kv = {"bf16": "bfloat16", "fp16": "float16", "int4": "bfloat16"}[precision]
    cache = next(tensor for tensor in facts["inputs"] if tensor["name"] == "past_key_values.0.key")
    assert cache == {"name": "past_key_values.0.key", "shape": [-1, 2, LENGTH, 16], "dtype": kv}
    assert facts["outputs"][0] == {"name": "logits", "shape": [-1, -1, 320], "dtype": "float32"}


@needs_rtx
def test_the_sidecar_and_the_manifest_say_what_the_plan_is(folder: Path) -> None:
    result = run(
        "build", folder, "--compute-capability", "8.9", "--compute-capability", "12.0", "--prompt-length", 64
    )
    assert result.exit_code == 0, result.output
    sidecar = json.loads((folder / "model.plan.json").read_text())
    assert sidecar["backend"] == "rtx"
    assert sidecar["compute_capabilities"] == ["8.9", "12.0"]
    assert (sidecar["precision"], sidecar["cache_length"]) == ("bf16", LENGTH)
    assert [list(profile.values()) for profile in sidecar["profiles"]] == [
        ["decode", 1, 1, 1],
        ["prompt", 1, 64, 64],
    ]
    assert sidecar["plan"]["sha256"] == hashlib.sha256((folder / "model.plan").read_bytes()).hexdigest()
    assert sidecar["onnx"]["model.onnx"] == hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    assert sidecar["aliases"]["present.2.value"] == "past_key_values.2.value"
    assert sidecar["built"]["peak_memory_bytes"] > 1 << 20
    manifest = read_manifest(folder)
    manifest.check_files(hashes=True)
    assert manifest.raw["engine"]["file"] == "model.plan"
    assert not [name for name in names(folder) if name.startswith(".")]


@needs_rtx
def test_a_second_build_replaces_the_first(folder: Path) -> None:
    build(folder, FOR_89, QUIET)
    build(folder, BuildOptions(compute_capabilities=("8.6",), opt_level=0), QUIET)
    manifest = read_manifest(folder)
    manifest.check_files(hashes=True)
    assert manifest.raw["engine"]["compute_capabilities"] == ["8.6"]
    assert sum(entry.path == "model.plan" for entry in manifest.files) == 1


@needs_rtx
def test_a_refused_graph_is_told_with_its_node_and_leaves_nothing(folder: Path, monkeypatch) -> None:
    """A dynamic cache reaches the real parser here, past our own check."""
    before = names(folder)
    edit_graph(folder, dynamic_cache)
    monkeypatch.setattr(engine, "check_graph", lambda path: None)
    refused(
        run("build", folder, "--compute-capability", "8.9"),
        "TensorRT-RTX",
        "refuses the graph",
        "/model/layers.0/self_attn/TensorScatter",
    )
    assert names(folder) == before


@needs_rtx
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt-length", "129"], "--prompt-length 129 is not within 1 and the cache's 128"),
        (["--timing-cache", "timings"], "a timing cache holds what a GPU was measured to do"),
        (["--compute-capability", "7.5"], "compute capability 7.5 have no bfloat16"),
        (["--strip-weights"], "cannot be built ahead of time"),
        (["--version-compatible"], "rtx cannot make version-compatible plans"),
        (["--hardware-compatible"], "rtx has no hardware-compatible plans"),
    ],
)
def test_options_that_do_not_fit(folder: Path, arguments: list[str], message: str) -> None:
    before = names(folder)
    refused(run("build", folder, "--compute-capability", "8.9", *arguments), message)
    assert names(folder) == before


@needs_rtx
def test_altered_weights_are_not_built(folder: Path) -> None:
    data = folder / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[5000] ^= 1
    data.write_bytes(content)
    refused(run("build", folder, "--compute-capability", "8.9"), "model.onnx.data is altered")
    assert "model.plan" not in names(folder)


@needs_rtx
def test_too_little_memory_is_told_before(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "available_memory", lambda: 1 << 20)
    refused(run("build", folder, "--compute-capability", "8.9"), "GB of memory", "--precision int4")


@needs_rtx
def test_a_full_disk_leaves_the_old_plan(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(folder, FOR_89, QUIET)
    old = (folder / "model.plan").read_bytes()
    real = Path.open

    def full(self: Path, *arguments: Any, **options: Any) -> Any:
        return real(Path("/dev/full") if self.name == ".model.plan.tmp" else self, *arguments, **options)

    monkeypatch.setattr(Path, "open", full)
    refused(run("build", folder, "--compute-capability", "8.6"), "no space left on the disk")
    assert (folder / "model.plan").read_bytes() == old
    read_manifest(folder).check_files(hashes=True)


@needs_rtx
@pytest.mark.parametrize(("how", "exit_code", "said"), [("SIGINT", 130, True), ("SIGTERM", 143, False)])
def test_ctrl_c_and_sigterm_end_a_build_cleanly(
    exported: TinyExports, tmp_path: Path, how: str, exit_code: int, said: bool
) -> None:
    """SIGTERM ended it with the exit code of Ctrl-C."""
    folder = Path(
        shutil.copytree(exported("bf16", num_hidden_layers=24, vocab_size=1000), tmp_path / "model")
    )
    before = names(folder)
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from qconvert.cli import main; main(sys.argv[1:])"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, "build", folder, "--compute-capability", "8.9"],
        stderr=subprocess.PIPE,
        text=True,
    )
    while ".model.plan.tmp" not in names(folder) and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(signal.Signals[how])
    _, message = child.communicate(timeout=120)
    assert (child.returncode, "interrupted" in message) == (exit_code, said), message
    assert "Traceback" not in message
    assert names(folder) == before
