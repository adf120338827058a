"""If one of these fails, a user is not told what becomes of a quantised checkpoint, or wrongly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qconvert.checkpoint.load import load_model, open_checkpoint
from qconvert.checkpoint.weights import CheckpointWeights
from qconvert.export import ExportOptions, export
from qconvert.inspection.inspection import describe
from qconvert.progress import Progress
from tests.qconvert.quantising import make_compressed, make_gptq
from tests.qconvert.quantising_floats import make_float8
from tests.qconvert.test_quantised import KINDS, QUIET, stored

# What AutoRound writes beside the format's own fields; how codes were found, and nothing of what they are.
AUTOROUND: dict[str, Any] = {
    **{"amp": True, "autoround_version": "0.4.2", "batch_size": 8, "block_name_to_quantize": "model.layers"},
    **{"data_type": "int", "enable_minmax_tuning": True, "enable_norm_bias_tuning": False, "iters": 1000},
    **{"enable_quanted_input": True, "gradient_accumulate_steps": 1, "low_gpu_mem_usage": False, "lr": 0.001},
    **{"minmax_lr": 0.001, "nsamples": 512, "scale_dtype": "torch.float16", "seqlen": 2048, "train_bs": 8},
}
FLOAT8: dict[str, dict[str, Any]] = {
    "tiles": {},
    "tiles that do not fit": {"tile": (48, 80)},
    "one scale": {"tile": None},
    "one scale, no _inv": {"tile": None, "method": "fbgemm_fp8"},
    "a scale for each output": {"tile": (1, 0), "method": "fbgemm_fp8"},
}


def test_autoround_s_checkpoints_are_gptq_s(tmp_path: Path) -> None:
    """The fields about its training were refused as unknown."""
    written = make_gptq(tmp_path, settings=AUTOROUND)
    weights = CheckpointWeights(load_model(open_checkpoint(tmp_path)))
    assert written
    for name, found in written.items():
        assert torch.equal(weights[name], found.floats), name


@pytest.mark.parametrize("kind", FLOAT8)
def test_floats_of_8_bits_are_what_their_writer_meant(tmp_path: Path, kind: str) -> None:
    floats = make_float8(tmp_path, **FLOAT8[kind])
    weights = CheckpointWeights(load_model(open_checkpoint(tmp_path)))
    for name, due in floats.items():
        assert torch.equal(weights[name], due), name


@pytest.mark.parametrize("precision", ["fp32", None])
def test_floats_of_8_bits_are_dequantised_and_that_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], precision: str | None
) -> None:
    make_float8(tmp_path / "model")
    exported = export(
        str(tmp_path / "model"), ExportOptions(precision=precision, output=tmp_path / "out"), Progress()
    )
    assert exported.report is not None
    assert exported.report.passed
    told = " ".join(capsys.readouterr().err.split())
    assert "quantised already (floats of 8 bits in tiles of 32 x 32 (fp8))" in told
    assert ("rounded a second time to int8" if precision is None else "nothing is rounded") in told


@pytest.mark.parametrize(
    ("kind", "bits", "said"),
    [
        ("gptq: an order of inputs", 4.75, {"quant_method": "gptq", "desc_act": True, "orders of inputs": 8}),
        ("gptq: 8 bits, symmetric", 8.875, {"bits": 8, "sym": True, "group_size": 32}),
        ("awq", 4.625, {"version": "gemm", "zero_point": True}),
        ("compressed-tensors: 4 bits", 4.625, {"format": "pack-quantized", "group_0.symmetric": False}),
    ],
)
def test_inspect_explains_the_quantisation(
    tmp_path: Path, kind: str, bits: float, said: dict[str, Any]
) -> None:
    make, settings = KINDS[kind]
    written = make(tmp_path / "model", **settings)
    inspection = describe(tmp_path / "model")
    assert inspection.whole, inspection.problems
    facts = {fact.key: fact.value for fact in inspection.facts if fact.section == "quantisation"}
    assert facts["codes that can be kept"] == len(written)
    assert {key: facts[key] for key in said} == said
    (found,) = (value for key, value in facts.items() if "bits in groups" in key)
    assert abs(found - bits) < 0.4  # the smallest matrices have the longest share of orders and shapes
    exported = export(str(tmp_path / "model"), ExportOptions(output=tmp_path / "out", verify=False), QUIET)
    forecast = inspection.weight_bytes["kept"]
    assert forecast == (exported.folder / "model.onnx.data").stat().st_size


def test_what_other_programs_would_do_with_activations_and_cache_is_told(tmp_path: Path) -> None:
    eight = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    make_compressed(tmp_path / "model", settings={"kv_cache_scheme": eight})
    config = tmp_path / "model" / "config.json"
    content = json.loads(config.read_text())
    content["quantization_config"]["config_groups"]["group_0"]["input_activations"] = eight
    config.write_text(json.dumps(content))
    file = tmp_path / "model" / "model.safetensors"
    scales = {f"model.layers.0.self_attn.{part}_scale": torch.ones(1) for part in "kv"}
    save_file({**load_file(file), **scales}, file, metadata={"format": "pt"})
    inspection = describe(tmp_path / "model")
    assert inspection.whole, inspection.problems
    facts = {fact.key: fact.value for fact in inspection.facts if fact.section == "quantisation"}
    assert facts["kv_cache_scheme"] == facts["group_0.input_activations"] == 8
    exported = export(str(tmp_path / "model"), ExportOptions(output=tmp_path / "out"), QUIET)
    assert exported.report is not None
    assert exported.report.passed


def test_inspect_names_a_matrix_that_is_not_what_it_should_be(tmp_path: Path) -> None:
    make_gptq(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.scales"]
    save_file(tensors, tmp_path / "model.safetensors")
    inspection = describe(tmp_path)
    assert inspection.problems == ("model.layers.0.mlp.up_proj.scales is missing",)


def test_matrices_whose_groups_fit_no_block_are_exported_in_floats_and_that_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"hidden_size": 192, "intermediate_size": 288}
    written = make_gptq(tmp_path / "model", others=(".*down_proj", 4, 24), **sizes)
    exported = export(str(tmp_path / "model"), ExportOptions(output=tmp_path / "out"), Progress())
    assert exported.report is not None
    assert exported.report.passed
    assert set(stored(exported.folder)) == {name for name in written if "down_proj" not in name}
    told = " ".join(capsys.readouterr().err.split())
    assert "2 quantised matrices have no place as they are (4 bits in groups of 24 (gptq)" in told


def test_where_no_group_fits_all_is_rounded_and_that_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_gptq(tmp_path / "model", group=24, hidden_size=192, intermediate_size=288, initializer_range=0.08)
    report = export(str(tmp_path / "model"), ExportOptions(output=tmp_path / "out"), Progress()).report
    assert report is not None
    assert report.passed
    assert "rounded a second time to int8" in " ".join(capsys.readouterr().err.split())
