"""A folder with a plan of a few bytes, complete and consistent, except that no GPU could run it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qrun.folder.manifest import read_manifest
from tests.tiny import write_tiny_tokenizer

PLAN_BYTES = b"vtrt" + bytes(range(256)) * 8
VERSION = "1.7.1.116"


def make_plan(folder: Path, **changes: Any) -> Path:
    """Write model.plan and its sidecar into a model folder, and name them in its manifest.

    Args:
        folder: has a qconvert.json.
        changes: other values of the sidecar.
    """
    manifest = read_manifest(folder)
    facts, kv = manifest.model, manifest.kv.dtype
    cache = [-1, facts.num_key_value_heads, facts.context_length, facts.head_size]
    layers = [f"{layer}.{part}" for layer in range(facts.num_hidden_layers) for part in ("key", "value")]
    most = min(1024, facts.context_length)
    sidecar: dict[str, Any] = {
        "format": "qconvert-plan",
        "format_version": 1,
        "backend": "rtx",
        "library_version": VERSION,
        "compute_capabilities": ["8.9", "12.0"],
        "version_compatible": False,
        "hardware_compatible": False,
        "stripped": False,
        "precision": manifest.precision,
        "cache_length": facts.context_length,
        "profiles": [
            {"name": "decode", "least": 1, "typical": 1, "most": 1},
            {"name": "prompt", "least": 1, "typical": min(256, most), "most": most},
        ],
        "inputs": [
            {"name": "input_ids", "shape": [-1, -1], "dtype": "int64"},
            {"name": "position_ids", "shape": [-1, -1], "dtype": "int64"},
            {"name": "logits_positions", "shape": [-1], "dtype": "int64"},
            *({"name": f"past_key_values.{name}", "shape": cache, "dtype": kv} for name in layers),
        ],
        "outputs": [
            {"name": "logits", "shape": [-1, -1, facts.vocab_size], "dtype": "float32"},
            *({"name": f"present.{name}", "shape": cache, "dtype": kv} for name in layers),
        ],
        "aliases": {f"present.{name}": f"past_key_values.{name}" for name in layers},
        "plan": {
            "file": "model.plan",
            "size": len(PLAN_BYTES),
            "sha256": hashlib.sha256(PLAN_BYTES).hexdigest(),
        },
        "onnx": {e.path: e.sha256 for e in manifest.files if e.path in ("model.onnx", "model.onnx.data")},
        **changes,
    }
    plan = folder / "model.plan"
    plan.write_bytes(PLAN_BYTES)
    (folder / "model.plan.json").write_text(json.dumps(sidecar, indent=2))
    files = [entry for entry in manifest.raw["files"] if not entry["path"].startswith("model.plan")]
    files += [_entry(plan), _entry(folder / "model.plan.json")]
    (folder / "qconvert.json").write_text(json.dumps({**manifest.raw, "files": files}))
    return plan


def make_plan_folder(folder: Path, **changes: Any) -> Path:
    """A model folder for TensorRT with its plan, tokenizer and template, whose graph is a stub; the plan."""
    folder.mkdir()
    write_tiny_tokenizer(folder)
    for name in ("model.onnx", "model.standard.onnx", "model.onnx.data"):
        (folder / name).write_bytes(name.encode())
    manifest = {
        "format": "qconvert-model",
        "format_version": 1,
        "name": "fake",
        "target": "tensorrt",
        "precision": "bf16",
        "model": {
            "architecture": "Qwen2ForCausalLM",
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_size": 16,
            "hidden_size": 64,
            "vocab_size": 320,
            "context_length": 128,
        },
        "graph": {"file": "model.onnx", "standard_file": "model.standard.onnx"},
        "kv_cache": {"dtype": "bfloat16", "bytes_per_token": 256, "length": 128},
        "tokens": {"eos": [258]},
        "verification": {"status": "passed"},
        "files": [_entry(path) for path in sorted(folder.iterdir())],
    }
    (folder / "qconvert.json").write_text(json.dumps(manifest))
    return make_plan(folder, **changes)


def edit_sidecar(plan: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change the sidecar, and the manifest with it, so that nothing but the sidecar is wrong."""
    path = plan.with_name("model.plan.json")
    sidecar = json.loads(path.read_text())
    edit(sidecar)
    path.write_text(json.dumps(sidecar))
    manifest = json.loads((plan.parent / "qconvert.json").read_text())
    files = [entry for entry in manifest["files"] if entry["path"] != path.name]
    manifest["files"] = [*files, _entry(path)]
    (plan.parent / "qconvert.json").write_text(json.dumps(manifest))


def _entry(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {"path": path.name, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
