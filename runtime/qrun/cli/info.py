"""What a model folder is, what it will cost, and whether it runs here: no session is opened."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qrun.backends.ort.wheels import check_onnxruntime_version, check_onnxruntime_wheels
from qrun.cli.plan_info import describe_plan, here, here_rows, plan_lines
from qrun.cli.terminal import hashing, rows, size
from qrun.errors import QrunError
from qrun.folder.manifest import Manifest, forecast_bytes
from qrun.folder.plan import PLAN_NAME, read_plan

_HOW = {
    "onnxruntime": " with ONNX Runtime",
    "tensorrt": ": its standard graph with ONNX Runtime, slowly, for comparison",
}


def check(manifest: Manifest, *, hashes: bool) -> None:
    """Hold the folder against its manifest, with a progress bar where files are hashed.

    Raises:
        QrunError: a file is missing, truncated or altered.
    """
    if not hashes:
        return manifest.check_files()
    with hashing(sum(entry.size for entry in manifest.files)) as progress:
        return manifest.check_files(hashes=True, progress=progress)


def describe(manifest: Manifest, *, hashes_checked: bool = False) -> dict[str, Any]:
    """The facts as one JSON object; sizes in bytes, lengths in tokens."""
    facts, edited = manifest.model, manifest.edited_files()
    return {
        "name": manifest.name,
        "folder": str(manifest.folder),
        "target": manifest.target,
        "precision": manifest.precision,
        "architecture": facts.architecture,
        "parameters": manifest.origin.parameters,
        "num_hidden_layers": facts.num_hidden_layers,
        "num_attention_heads": facts.num_attention_heads,
        "num_key_value_heads": facts.num_key_value_heads,
        "hidden_size": facts.hidden_size,
        "vocab_size": facts.vocab_size,
        "context_length": facts.context_length,
        "eos_token_ids": list(manifest.eos_token_ids),
        "kv_cache": {
            "dtype": manifest.kv.dtype,
            "bytes_per_token": manifest.kv.bytes_per_token,
            "bytes_at_full_context": forecast_bytes(manifest, facts.context_length),
        },
        "verification": manifest.origin.verdict,
        "source": manifest.origin.source,
        "created_by": manifest.origin.created_by,
        "total_bytes": sum(entry.size for entry in manifest.files),
        "hashes_checked": hashes_checked,
        "files": [
            {
                "path": entry.path,
                "size": entry.size,
                "sha256": entry.sha256,
                "edited": entry.path in edited,
                "link_to": _link_to(manifest.folder / entry.path),
            }
            for entry in manifest.files
        ],
        "here": here(_why_not_here(manifest)),
        "engine": _describe_engine(manifest, hashes_checked),
    }


def lines(info: dict[str, Any]) -> Iterator[str]:
    """The same for people."""
    kv = info["kv_cache"]
    parameters = f", {info['parameters'] / 1e6:,.1f} M parameters" if info["parameters"] else ""
    per_key_value = info["num_attention_heads"] // info["num_key_value_heads"]
    facts = {
        "model": f"{info['name']} ({info['architecture']}{parameters})",
        "folder": Path(info["folder"]),
        "runs on": f"{info['target']}, precision {info['precision']}",
        "layers": f"{info['num_hidden_layers']} of hidden size {info['hidden_size']:,}",
        "heads": f"{info['num_attention_heads']} query heads, {info['num_key_value_heads']} key/value heads "
        f"({per_key_value} queries share one)",
        "vocabulary": f"{info['vocab_size']:,} tokens, answers end at {_list(info['eos_token_ids'])}",
        "context": f"{info['context_length']:,} tokens",
        "KV cache": f"{kv['dtype']}, {size(kv['bytes_per_token'])} per token, "
        f"{size(kv['bytes_at_full_context'])} at full context",
        "verdict": info["verification"]["status"],
        "files": f"{len(info['files'])}, {size(info['total_bytes'])}, all there, "
        + ("hashes checked" if info["hashes_checked"] else "sizes checked"),
        **here_rows(info["here"], how=_HOW.get(info["target"], "")),
    }
    yield from rows(facts)
    for entry in sorted(info["files"], key=lambda entry: -entry["size"]):
        link = f", a link to {entry['link_to']}" if entry["link_to"] else ""
        edited = ", edited since the export" if entry["edited"] else ""
        yield f"  {size(entry['size']):>9}  {entry['path']}{link}{edited}"
    if info["engine"] is not None:
        yield ""
        yield from plan_lines(info["engine"])


def _link_to(path: Path) -> str | None:
    return str(path.resolve()) if path.is_symlink() else None


def _why_not_here(manifest: Manifest) -> QrunError | None:
    try:
        check_onnxruntime_wheels()
        check_onnxruntime_version(manifest)
    except QrunError as error:
        return error
    return None


def _describe_engine(manifest: Manifest, hashes_checked: bool) -> dict[str, Any] | None:
    if not manifest.has_plan:
        return None
    return describe_plan(read_plan(manifest.folder / PLAN_NAME), manifest, hashes_checked=hashes_checked)


def _list(token_ids: list[int]) -> str:
    return " or ".join(str(token_id) for token_id in token_ids) or "no token"
