"""The export as a user meets it: what the folder holds, and each wrong input with its message."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qconvert.export import ExportOptions, export
from qconvert.progress import Progress
from qrun.backends.opening import open_session
from qrun.folder.manifest import read_manifest
from tests.qconvert.building import refused, run

QUIET = Progress(quiet=True)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_command_leaves_one_complete_verified_folder(tied: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("export", tied, "--precision", "fp32")
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1].endswith("tied-onnx-fp32")
    folder = tmp_path / "tied-onnx-fp32"
    manifest = read_manifest(folder)
    manifest.check_files(hashes=True)
    assert manifest.verification == "passed"
    listed = {entry.path for entry in manifest.files} | {"qconvert.json"}
    assert set(names(folder)) == listed
    wanted = {"model.onnx", "model.onnx.data", "config.json", "generation_config.json", "tokenizer.json"}
    wanted |= {"tokenizer_config.json", "genai_config.json", "verification.json", "verification.md"}
    assert wanted <= listed
    assert names(tmp_path) == ["tied", "tied-onnx-fp32"]


def test_what_was_not_verified_says_so(tied: Path, tmp_path: Path) -> None:
    result = run("export", tied, "--output", tmp_path / "model", "--no-verify")
    assert result.exit_code == 0
    assert "not verified" in result.output
    assert read_manifest(tmp_path / "model").verification == "not verified"


def test_logits_of_the_exported_folder_are_pytorchs(tied: Path, tmp_path: Path) -> None:
    from transformers import Qwen2ForCausalLM

    folder = export(
        str(tied), ExportOptions(precision="fp32", output=tmp_path / "m", verify=False), QUIET
    ).folder
    ids = torch.arange(3, 103)[None]
    with torch.no_grad():
        expected = Qwen2ForCausalLM.from_pretrained(tied)(ids).logits.numpy()
    session = open_session(folder)
    assert np.abs(session.forward(ids.numpy(), session.new_cache(), "all") - expected).max() < 1e-3


def damage(checkpoint: Path, name: str, value: float) -> None:
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[5] = value
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_nan_and_inf_in_the_weights(
    tied: Path, tmp_path: Path, precision: str, value: float, name: str
) -> None:
    damage(tied, name, value)
    result = run("export", tied, "--precision", precision, "--output", tmp_path / "model", "--no-verify")
    refused(result, f"{name} holds NaN or Inf", "download the checkpoint again")
    assert names(tmp_path) == ["tied"]


def test_weights_too_large_for_fp16(tied: Path, tmp_path: Path) -> None:
    damage(tied, "model.layers.0.mlp.up_proj.weight", 1e6)
    result = run("export", tied, "--precision", "fp16", "--output", tmp_path / "model", "--no-verify")
    refused(
        result, "model.layers.0.mlp.up_proj.weight", "float16 cannot hold", "--precision fp32, int8 or int4"
    )
    assert names(tmp_path) == ["tied"]


def test_an_existing_output(tied: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("mine")
    refused(run("export", tied, "--output", tmp_path / "model"), "exists already", "--force")
    refused(run("export", tied, "--output", tmp_path / "model", "--force"), "did not make")
    assert names(tmp_path / "model") == ["notes.txt"]


def test_no_space(tied: Path, tmp_path: Path, monkeypatch) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**9, 10**9, 1000))
    refused(run("export", tied, "--output", tmp_path / "model"), "GB are needed", "free some space")
    assert names(tmp_path) == ["tied"]


def test_an_unwritable_output(tied: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(run("export", tied, "--output", tmp_path / "file" / "model"), "cannot write", "another output")
    assert names(tmp_path) == ["file", "tied"]


def test_a_missing_folder(tmp_path: Path) -> None:
    refused(run("export", tmp_path / "nowhere"), "nowhere")
    assert names(tmp_path) == []


def test_wrong_usage_is_exit_code_2(tied: Path) -> None:
    assert run("export", tied, "--precision", "int3").exit_code == 2
    assert run("export", tied, "--block-size", "48").exit_code == 2
    assert run("export").exit_code == 2


def test_a_failed_verification_publishes_nothing(tied: Path, tmp_path: Path, monkeypatch) -> None:
    import qconvert.export

    real = qconvert.export.rope_tables

    def wrong_theta(config, length):
        config.rope_parameters["rope_theta"] *= 2
        try:
            return real(config, length)
        finally:
            config.rope_parameters["rope_theta"] /= 2

    monkeypatch.setattr("qconvert.export.rope_tables", wrong_theta)
    result = run("export", tied, "--precision", "fp32", "--output", tmp_path / "model")
    refused(result, "does not compute what PyTorch computes", "--keep-failed")
    assert names(tmp_path) == ["tied"]
    result = run("export", tied, "--precision", "fp32", "--output", tmp_path / "model", "--keep-failed")
    refused(result, "model.failed")
    assert names(tmp_path) == ["model.failed", "tied"]
    verdict = json.loads((tmp_path / "model.failed" / "qconvert.json").read_text())["verification"]
    assert verdict["status"] == "failed"
