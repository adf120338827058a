"""Balanced 4 bits for TensorRT: symmetric blocks, positive scales, and which mistakes the proof finds.

If these fail, ``--target tensorrt --precision int4`` is less exact than it could be, or wrong without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qconvert.calibration.gptq.solve as solving
import qconvert.export as flow
from qconvert.calibration.awq import Balancing
from qconvert.calibration.balance import LayerWork, _Trial
from qconvert.calibration.walk import Walk
from qconvert.checkpoint.load import load_model, open_checkpoint
from qconvert.folder.tensors import save_tensors
from qconvert.formats.blocks import unpack
from qconvert.formats.columns import Int4Columns, unpack_int4_columns
from qconvert.formats.folding import FoldedInput
from qconvert.formats.layout import Arrays
from qconvert.formats.recipe import BlockFormat, Recipe
from qconvert.formats.record import FACTORS_NAME, RECORD_NAME, read_factors
from qconvert.proof.report import Report
from qrun.folder.manifest import read_manifest
from tests.qconvert.building import run
from tests.qconvert.mutants import Exporter, overwrite, reseal, stored_at
from tests.qconvert.test_awq_export import LAYER, MISPLACED, NORM, ONE_KV_HEAD, folded_wrongly
from tests.tiny import make_tiny_checkpoint

LENGTH = 160
UP = f"{LAYER}.mlp.up_proj.weight"


class TensorRTExporter(Exporter):
    """The same for TensorRT."""

    def export(self, precision: str = "int4", **options: Any) -> Path:
        return super().export(precision, target="tensorrt", max_length=LENGTH, **options)


@pytest.fixture
def exporter(tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TensorRTExporter:
    return TensorRTExporter(tied, tmp_path, monkeypatch)


def scales_of(folder: Path, name: str) -> np.ndarray:
    return Arrays(folder / "model.onnx")[f"{name}.int4_scales"].astype(np.float32)


def codes_of(folder: Path, name: str) -> np.ndarray:
    return Arrays(folder / "model.onnx")[f"{name}.int4"].astype(np.int8)


def test_the_command_publishes_a_verified_folder_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_tiny_checkpoint(tmp_path / "tiny", initializer_range=0.1)
    options = ("--target", "tensorrt", "--precision", "int4", "--max-length", LENGTH)
    result = run("export", "tiny", *options)
    assert result.exit_code == 0, result.output
    folder = tmp_path / "tiny-tensorrt-int4"
    assert {path.name for path in tmp_path.iterdir()} == {"tiny", folder.name}
    manifest = read_manifest(folder)
    manifest.check_files(hashes=True)
    assert manifest.verification == "passed"
    stated: Any = manifest.raw["recipe"]
    assert stated["calibration"]["method"] == "awq"
    assert stated["linear"]["scale_dtype"] == "bfloat16"
    files = {file.name for file in folder.iterdir()}
    assert {RECORD_NAME, FACTORS_NAME} <= files
    assert len(read_factors(folder)) == 4 * 3


@pytest.mark.parametrize(
    ("sizes", "more"),
    [
        ({"num_key_value_heads": 1, "vocab_size": 4096}, ()),
        ({"family": "qwen3"}, ()),
        ({"family": "llama"}, ("--block-size", "16")),
        ({"sliding": True, "tie_word_embeddings": False}, ()),
        ({"hidden_size": 80, "intermediate_size": 144} | ONE_KV_HEAD, ()),
    ],
    ids=["one value head", "qwen3", "llama", "windows", "blocks of 16"],
)
def test_models_of_all_kinds_are_verified(
    tmp_path: Path, sizes: dict[str, Any], more: tuple[str, ...]
) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model", initializer_range=0.1, **sizes)
    options = ("--target", "tensorrt", "--precision", "int4", "--max-length", LENGTH, *more)
    result = run("export", folder, *options, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert read_manifest(tmp_path / "out").recipe.method == "awq"


def test_without_a_tokenizer_weights_are_rounded_to_nearest_and_the_user_is_told(
    tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tied / "tokenizer.json").unlink()
    options = ("--target", "tensorrt", "--precision", "int4", "--no-verify")
    result = run("export", tied, *options)
    assert result.exit_code == 0, result.output
    assert "no tokenizer for its vocabulary" in " ".join(result.output.split())
    assert read_manifest(tmp_path / "tied-tensorrt-int4-rtn").recipe.method is None
    refused = run("export", tied, *options, "--recipe", "awq", "-o", "other")
    assert refused.exit_code == 1
    assert "use --recipe rtn" in " ".join(refused.output.split())


def test_scales_are_positive_and_all_sixteen_codes_are_used(exporter: TensorRTExporter) -> None:
    """TensorRT's parser refuses scales that are not; rounding to nearest leaves -8 unused."""
    nearest = exporter.export(recipe="rtn")
    assert codes_of(nearest, UP).min() == -7
    folder = exporter.export(force=True)
    for name in (UP, f"{LAYER}.self_attn.q_k_v_proj.weight", f"{LAYER}.mlp.down_proj.weight"):
        assert scales_of(folder, name).min() > 0
        assert set(np.unique(codes_of(folder, name))) == set(range(-8, 8))


def test_scales_are_solved_in_the_type_in_which_they_are_stored(tied: Path) -> None:
    """Else they are rounded after the codes were chosen for them, and are another grid."""
    fmt = BlockFormat(4, 32, symmetric=True, scale_dtype="bfloat16")
    recipe = Recipe("int4", "bfloat16", fmt, None)
    walk = Walk(load_model(open_checkpoint(tied)), Balancing(recipe), [[*range(1, 33)]] * 2)
    columns = Int4Columns(32, "bfloat16")
    for _, rounded in walk.rounded():
        for packed in rounded.values():
            stored = columns.repack(packed)
            values = unpack_int4_columns(stored.data, stored.scales)
            assert torch.equal(values, unpack(packed, fmt, values.shape[1]))


def test_inputs_that_are_not_rounded_weigh_nothing_in_the_choice_of_factors(tied: Path) -> None:
    """Activations are bfloat16 here; ONNX Runtime's products round them to 8 bits, block by block."""
    model = load_model(open_checkpoint(tied))
    fmt = BlockFormat(4, 32, symmetric=True, scale_dtype="bfloat16")
    for activations, rounded in (("float32", True), ("bfloat16", False)):
        walk = Walk(model, Balancing(Recipe("int4", activations, fmt, None)), [[*range(1, 33)]] * 2)
        assert walk._look(0, but=0).rounds_inputs is rounded
    generator = torch.Generator().manual_seed(0)
    inputs, rows = (torch.randn((40, 64), generator=generator) for _ in range(2))
    squares, none = inputs.square().mean(0), torch.ones(64)
    with_noise, without = (_Trial([(rows, 1.0)], squares, seen, fmt).error(none) for seen in (inputs, None))
    assert 0 < without < with_noise


# The proof.


def faults(report: Report) -> set[str]:
    assert not report.passed
    return {fault.tensor for fault in report.weights.faults}


@pytest.mark.parametrize("change", MISPLACED.values(), ids=MISPLACED)
def test_factors_folded_into_the_wrong_place_are_noticed(
    exporter: TensorRTExporter, change: Callable[..., None]
) -> None:
    report = exporter.verify(exporter.export_with_recipe("awq", "write_graph", folded_wrongly(change)))
    assert any(name == NORM or name.endswith("self_attn.v_proj.bias") for name in faults(report))


def test_another_factor_in_the_record_is_noticed(exporter: TensorRTExporter) -> None:
    folder = exporter.export()
    true = read_factors(folder)
    assert exporter.verify(folder).passed
    for name in ("input_layernorm", "post_attention_layernorm", "mlp.up_proj", "self_attn.v_proj"):
        for factor in (2.0, 0.5):
            factors = {key: each.clone() for key, each in true.items()}
            factors[f"{LAYER}.{name}.weight"][3] *= factor
            save_tensors({key: each.bfloat16() for key, each in factors.items()}, folder / FACTORS_NAME)
            reseal(folder)
            assert any(name in fault for fault in faults(exporter.verify(folder))), (name, factor)


def test_a_search_that_cuts_an_outlier_channel_off_is_noticed(
    exporter: TensorRTExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It makes most weights finer, and one column shorter as a whole, which no mean over blocks shows."""
    true, column = solving.search_steps, 5

    def clipping(values: torch.Tensor, *rest: Any) -> Any:
        others = values.clone()
        others[..., column, :] = 0
        return true(others, *rest)

    def even(work: LayerWork, found: FoldedInput, _: Any) -> torch.Tensor:
        """Factors would balance the outlier; a folder without them is right as well."""
        return torch.ones(len(model.get_parameter(found.divided)))

    model = exporter.reference.model
    with torch.no_grad():
        for layer in range(3):
            model.get_parameter(f"model.layers.{layer}.mlp.up_proj.weight")[:, column] *= 4
    monkeypatch.setattr(flow, "load_model", lambda _: model)
    monkeypatch.setattr(LayerWork, "_factors", even)
    assert exporter.verify(exporter.export()).passed
    monkeypatch.setattr(solving, "search_steps", clipping)
    report = exporter.verify(exporter.export(force=True))
    assert UP in faults(report)
    assert any("as a whole" in fault.what for fault in report.weights.faults)


@pytest.mark.parametrize("by", [1.01, 1.5])
def test_a_scale_that_is_not_the_recipes_is_noticed(exporter: TensorRTExporter, by: float) -> None:
    """One block of one row, a hundredth too long: no logit would tell."""
    folder = exporter.export()
    name = f"{UP}.int4_scales"
    data, offset, _ = stored_at(folder, name)
    scale = torch.frombuffer(bytearray(data.read_bytes()[offset + 6 : offset + 8]), dtype=torch.bfloat16)
    other = (scale.float() * by).bfloat16()
    overwrite(folder, name, 6, other.view(torch.int16).numpy().tobytes())
    assert faults(exporter.verify(folder)) == {UP}


def test_one_changed_code_is_noticed(exporter: TensorRTExporter) -> None:
    folder = exporter.export()
    data, offset, length = stored_at(folder, f"{UP}.int4")
    overwrite(folder, f"{UP}.int4", length - 1, bytes([data.read_bytes()[offset + length - 1] ^ 16]))
    assert faults(exporter.verify(folder)) == {UP}


def test_weights_rounded_to_nearest_under_the_name_of_the_recipe_are_noticed(
    exporter: TensorRTExporter,
) -> None:
    """They are the checkpoint's within half a step: only the record tells that nothing was calibrated."""
    true = flow.write_graph

    def write(*given: Any, rounded: Any, **named: Any) -> None:
        true(*given, rounded=None, **named)

    report = exporter.verify(exporter.export_with_recipe("awq", "write_graph", write))
    assert len(faults(report)) == 7 * 3


def test_the_record_lost_is_noticed(exporter: TensorRTExporter) -> None:
    folder = exporter.export()
    (folder / RECORD_NAME).write_text('{"float32_sha256": {}}\n')
    reseal(folder)
    assert len(faults(exporter.verify(folder))) == 7 * 3
