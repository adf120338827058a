"""If these fail, ``qconvert export --engine`` wastes an export, loses one, or builds another plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qconvert.errors import QconvertError
from qconvert.tensorrt import plan as engine
from qconvert.tensorrt.traps import check_graph
from qrun.folder.manifest import read_manifest
from tests.qconvert.building import names, needs_rtx, refused, run


def export(checkpoint: Path, output: Path, *more: object):
    return run("export", checkpoint, "--engine", "-o", output, "--compute-capability", "8.9", *more)


@needs_rtx
def test_a_checkpoint_to_a_plan_in_one_go(tied: Path, tmp_path: Path) -> None:
    output = tmp_path / "model"
    result = export(tied, output, "--max-length", 128, "--prompt-length", 32)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == str(output / "model.plan")
    manifest = read_manifest(output)
    manifest.check_files(hashes=True)
    assert (manifest.target, manifest.precision, manifest.verification) == ("tensorrt", "bf16", "passed")
    sidecar = json.loads((output / "model.plan.json").read_text())
    assert (sidecar["compute_capabilities"], sidecar["cache_length"]) == (["8.9"], 128)
    assert [profile["most"] for profile in sidecar["profiles"]] == [1, 32]


@needs_rtx
def test_a_build_that_fails_leaves_the_export_and_says_how_to_go_on(
    tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "model"

    def refuse(path: Path) -> None:
        raise QconvertError("TensorRT refuses node 7", where=path, hint="update it")

    monkeypatch.setattr(engine, "check_graph", refuse)
    refused(
        export(tied, output, "--no-verify", "--prompt-length", 64),
        f"{output} is exported, and its plan was not built: TensorRT refuses node 7",
        "update it. The export need not be repeated: go on with "
        f"`qconvert build {output} --prompt-length 64 --compute-capability 8.9`",
    )
    read_manifest(output).check_files(hashes=True)
    assert "model.plan" not in names(output)
    monkeypatch.setattr(engine, "check_graph", check_graph)
    assert run("build", output, "--compute-capability", "8.9").exit_code == 0


@needs_rtx
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "onnxruntime"], "--engine builds a TensorRT plan, and --target onnxruntime is not for"),
        (["--precision", "fp32"], "no plan can be built of --precision fp32"),
        (["--precision", "int8"], "int8"),
        (["--backend", "tensorrt"], "tensorrt"),
        (["--compute-capability", "9.9"], "cannot build for compute capability 9.9"),
        (["--compute-capability", "7.5"], "compute capability 7.5 have no bfloat16"),
        (["--prompt-length", "5000"], "--prompt-length 5,000 is not within 1 and the cache's 4,096"),
        (["--max-length", "1000"], "1,000"),
    ],
)
def test_what_cannot_be_built_is_not_exported(
    tied: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    before = names(tmp_path)
    refused(export(tied, tmp_path / "model", *options), message)
    assert names(tmp_path) == before


def test_build_options_without_engine_are_wrong_usage(tied: Path, tmp_path: Path) -> None:
    result = run("export", tied, "-o", tmp_path / "model", "--compute-capability", "8.9")
    assert (result.exit_code, "are for --engine" in result.output) == (2, True)
    assert "model" not in names(tmp_path)
