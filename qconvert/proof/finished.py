"""The proof of a finished folder: its files hashed first, and its report replaced where that is asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qconvert.checkpoint.load import Checkpoint, load_model, open_checkpoint, resolve_source, with_adapters
from qconvert.checkpoint.reference import Reference
from qconvert.errors import QconvertError
from qconvert.folder.lock import only_changer
from qconvert.progress import Progress
from qconvert.proof.report import REPORT_JSON, REPORT_MARKDOWN, Report
from qconvert.proof.report_view import write_report
from qconvert.proof.verify import verify
from qrun.backends.trt.checks import why_not_here
from qrun.folder.entry import sha256_of
from qrun.folder.manifest import MANIFEST_NAME, Manifest, names_plan, read_manifest
from qrun.folder.plan import read_plan


def verify_folder(
    path: Path, checkpoint: str, progress: Progress, *, record: bool = False, adapters: tuple[str, ...] = ()
) -> Report:
    """The same proof for a finished folder, whose files are hashed against the manifest first.

    Args:
        path: the model folder, or a .onnx file or plan inside it.
        checkpoint: a checkpoint's folder or a model id.
        record: write the report and its verdict into the folder; otherwise it is only read.
        adapters: those that were merged, each FOLDER or FOLDER=WEIGHT.

    Raises:
        QrunError: a file that is not the manifest's, a bad checkpoint or one of another model, a plan that
            this machine cannot run, or another process that is changing the folder.
    """
    manifest = read_manifest(path)
    if names_plan(path):
        _check_plan(path, manifest, record)
    else:
        path = manifest.folder
    if not record:
        return _verify(path, manifest, (checkpoint, adapters), progress)
    _check_writable(manifest.folder)
    with only_changer(manifest.folder):
        report = _verify(path, manifest, (checkpoint, adapters), progress)
        _record(manifest, report)
    return report


def _verify(
    path: Path, manifest: Manifest, reference: tuple[str, tuple[str, ...]], progress: Progress
) -> Report:
    with progress.task("hashing the files", sum(file.size for file in manifest.files)) as advance:
        manifest.check_files(hashes=True, progress=advance)
    checkpoint, adapters = reference
    source = with_adapters(open_checkpoint(resolve_source(checkpoint)), adapters)
    _check_adapters(manifest, source)
    with progress.task("loading the checkpoint"):
        model = load_model(source)
    return verify(path, source, Reference(model), progress)


def _check_adapters(manifest: Manifest, source: Checkpoint) -> None:
    """Refuse other adapters than those that were merged, before minutes of work show it."""
    recorded = (manifest.origin.source or {}).get("adapters", [])
    if [_identity(each) for each in recorded] == [_identity(each) for each in source.adapters]:
        return
    names = " ".join(f"--adapter {each.get('name')}={each.get('weight')}" for each in recorded)
    raise QconvertError(
        "these are not the adapters that were merged into the folder's weights",
        where=manifest.folder,
        hint=f"give them in their order: {names}" if names else "leave --adapter out: none was merged",
    )


def _identity(adapter: Mapping[str, Any]) -> tuple[Any, Any]:
    return adapter.get("weight"), adapter.get("sha256")


def _check_plan(path: Path, manifest: Manifest, record: bool) -> None:
    """Refuse what would end the verification of a plan, before minutes of hashing and loading."""
    refusal = why_not_here(read_plan(path), manifest)
    if refusal is not None:
        raise refusal
    if record:
        raise QconvertError(
            "--write is for folders: the report in this one is about its ONNX graph, not about its plan",
            where=path,
            hint="leave --write out; --json prints the report of the plan",
        )


def _check_writable(folder: Path) -> None:
    """A folder that cannot be written is refused before minutes of work, and not after them."""
    if not os.access(folder, os.W_OK | os.X_OK):
        raise QconvertError(
            "the report cannot be written: the folder is read-only",
            where=folder,
            hint="leave --write out, or make the folder writable",
        )


def _record(manifest: Manifest, report: Report) -> None:
    """Replace the folder's report, then its manifest, by one rename each.

    Raises:
        QconvertError: a file cannot be written.
    """
    try:
        _replace_report(manifest, report)
    except OSError as error:
        raise QconvertError(
            f"the report cannot be written: {error.strerror}",
            where=error.filename or manifest.folder,
            hint="make the folder and its reports writable, or leave --write out",
        ) from error


def _replace_report(manifest: Manifest, report: Report) -> None:
    write_report(report, manifest.folder)
    reports = (REPORT_JSON, REPORT_MARKDOWN)
    entries = [
        {"path": file.path, "size": file.size, "sha256": file.sha256}
        for file in manifest.files
        if file.path not in reports
    ]
    for name in reports:
        path = manifest.folder / name
        entries.append({"path": name, "size": path.stat().st_size, "sha256": sha256_of(path)})
    facts = {**manifest.raw, "verification": report.verdict(), "files": entries}
    written = manifest.folder / f".{MANIFEST_NAME}.new"
    written.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    written.replace(manifest.folder / MANIFEST_NAME)
