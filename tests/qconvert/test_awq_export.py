"""Balanced exports: what the folder holds, and which mistakes the proof finds in it.

Factors are recorded, since blocks that were searched do not tell them: if these fail, a wrong one passes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qconvert.calibration.awq
import qconvert.export
from qconvert.errors import QconvertError
from qconvert.folder.tensors import save_tensors
from qconvert.formats.folding import Folding
from qconvert.formats.record import FACTORS_NAME, RECORD_NAME, read_factors
from qrun.folder.manifest import read_manifest
from tests.qconvert.building import run
from tests.qconvert.mutants import Exporter, overwrite, reseal, stored_at
from tests.tiny import make_tiny_checkpoint

LAYER = "model.layers.1"
FOLDS = pytest.mark.parametrize("recipe", ["awq", "gptq"])
BOTH = {"prefill": True, "int8_kv_cache": True}


@pytest.fixture
def exporter(tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Exporter:
    return Exporter(tied, tmp_path, monkeypatch)


def test_the_command_publishes_a_verified_folder_and_nothing_else(
    tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("export", tied, "--precision", "int4")
    assert result.exit_code == 0, result.output
    folder = tmp_path / "tied-onnx-int4"
    assert {path.name for path in tmp_path.iterdir()} == {"tied", folder.name}
    manifest = read_manifest(folder)
    manifest.check_files(hashes=True)
    assert manifest.verification == "passed"
    stated: Any = manifest.raw["recipe"]
    assert stated["calibration"]["method"] == "awq"
    assert stated["calibration"]["tokens"] == 4096
    assert {FACTORS_NAME, RECORD_NAME} <= {file.name for file in folder.iterdir()}
    assert len(read_factors(folder)) == 4 * 3


ONE_KV_HEAD = {"num_attention_heads": 5, "num_key_value_heads": 1}


@pytest.mark.parametrize(
    ("recipe", "sizes", "more"),
    [
        ("awq", {"vocab_size": 4096}, ()),
        ("awq", {"vocab_size": 4096}, ("--prefill", "int8", "--kv-cache", "int8")),
        (
            "awq",
            {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 6},
            ("--prefill", "int8"),
        ),
        ("awq-mixed", {"vocab_size": 4096}, ()),
        ("awq-mixed", {"vocab_size": 4096}, ("--prefill", "int8", "--kv-cache", "int8")),
        # Blocks of 8 bits of 16 weights: nothing longer divides a row.
        ("awq-mixed", {"hidden_size": 80, "intermediate_size": 144} | ONE_KV_HEAD, ()),
    ],
)
def test_it_is_verified_with_all_that_an_export_can_have(
    tmp_path: Path, recipe: str, sizes: dict[str, int], more: tuple[str, ...]
) -> None:
    """Both graphs share the KV cache, and with it the factors of the values; their norms are their own."""
    # Smaller weights than elsewhere: each processor rounds in its own way, and none may come near a limit.
    folder = make_tiny_checkpoint(tmp_path / "model", initializer_range=0.1, **sizes)
    result = run("export", folder, "--precision", "int4", "--recipe", recipe, *more, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert read_manifest(tmp_path / "out").verification == "passed"


def test_without_a_tokenizer_weights_are_rounded_to_nearest_and_the_user_is_told(
    tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tied / "tokenizer.json").unlink()
    result = run("export", tied, "--precision", "int4", "--no-verify")
    assert result.exit_code == 0, result.output
    assert "no tokenizer for its vocabulary" in " ".join(result.output.split())
    assert read_manifest(tmp_path / "tied-onnx-int4-rtn").recipe.method is None
    for more in (("--precision", "int4", "--recipe", "awq"), ("--quality", "balanced")):
        refused = run("export", tied, *more, "--no-verify", "-o", "other")
        assert refused.exit_code == 1
        assert "use --recipe rtn" in " ".join(refused.output.split())


@pytest.mark.parametrize(
    ("quality", "name"), [("fast", "int4"), ("balanced", "int4-awq-mixed"), ("best", "int8")]
)
def test_a_quality_stands_for_a_precision_and_a_recipe(
    tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quality: str, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("export", tied, "--quality", quality)
    assert result.exit_code == 0, result.output
    manifest = read_manifest(tmp_path / f"tied-onnx-{name}")
    assert manifest.verification == "passed"
    if quality == "balanced":
        assert manifest.raw["recipe"]["exceptions"]["down_proj"]["bits"] == 8


@pytest.mark.parametrize(
    ("more", "other"),
    [
        (("--precision", "int8"), "--precision"),
        (("--recipe", "gptq"), "--recipe"),
        (("--target", "tensorrt"), "TensorRT"),
        (("--engine",), "TensorRT"),
    ],
)
def test_a_quality_and_what_contradicts_it_are_refused(
    tied: Path, tmp_path: Path, more: tuple[str, ...], other: str
) -> None:
    result = run("export", tied, "--quality", "best", *more, "-o", tmp_path / "out")
    assert result.exit_code != 0
    assert f"not together with {other}" in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_gptq_takes_two_percent_more_bytes_at_most(exporter: Exporter) -> None:
    sizes = {
        recipe: (exporter.export("int4", recipe=recipe, force=True) / "model.onnx.data").stat().st_size
        for recipe in ("awq", "gptq")
    }
    assert sizes["awq"] < sizes["gptq"] < 1.02 * sizes["awq"]


# The proof.


def changed(name: str, factor: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(factors: dict[str, torch.Tensor]) -> None:
        factors[f"{LAYER}.{name}.weight"][3] *= factor

    return change


@pytest.fixture
def recorded(exporter: Exporter, recipe: str) -> Callable[[Callable[[dict[str, torch.Tensor]], Any]], Path]:
    """A folder whose record of factors is another; the manifest says that it is right."""
    folder = exporter.export("int4", recipe=recipe)
    true = read_factors(folder)

    def write(change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
        factors = {name: factor.clone() for name, factor in true.items()}
        change(factors)
        save_tensors({name: each.bfloat16() for name, each in factors.items()}, folder / FACTORS_NAME)
        reseal(folder)
        return folder

    return write


@FOLDS
def test_another_factor_in_the_record_is_noticed(exporter: Exporter, recorded: Any) -> None:
    """A mean over blocks did not see that a single row and column were twice as long."""
    assert exporter.verify(recorded(lambda factors: None)).passed
    for name in ("input_layernorm", "post_attention_layernorm", "mlp.up_proj", "self_attn.v_proj"):
        for factor in (2.0, 0.5):
            report = exporter.verify(recorded(changed(name, factor)))
            assert not report.passed, (name, factor)
            assert any(name in fault.tensor for fault in report.weights.faults), (name, factor)


@FOLDS
def test_factors_that_are_none_are_refused(exporter: Exporter, recorded: Any) -> None:
    changes: list[Callable[[dict[str, torch.Tensor]], Any]] = [
        lambda factors: factors.popitem(),
        changed("mlp.up_proj", float("nan")),
        changed("mlp.up_proj", -1.0),
        changed("mlp.up_proj", 2.0**20),
    ]
    for change in changes:
        with pytest.raises(QconvertError, match="are not recorded, or are none"):
            exporter.verify(recorded(change))
    folder = recorded(lambda factors: None)
    (folder / FACTORS_NAME).write_bytes(b"nothing")
    reseal(folder)
    with pytest.raises(QconvertError, match="record of folded factors is damaged"):
        exporter.verify(folder)


def folded_wrongly(change: Callable[[dict[str, torch.Tensor], dict[str, torch.Tensor]], None]) -> Any:
    """``export.write_graph`` with another folding than the weights were rounded with."""
    true = qconvert.export.write_graph

    def write(*given: Any, balance: Folding, **named: Any) -> None:
        divided, multiplied = dict(balance.divided), dict(balance.multiplied)
        change(divided, multiplied)
        true(*given, balance=Folding(divided, multiplied), **named)

    return write


def exchange(first: str, second: str) -> Callable[..., None]:
    def change(divided: dict[str, torch.Tensor], _: dict[str, torch.Tensor]) -> None:
        divided[first], divided[second] = divided[second], divided[first]

    return change


def balanced_bias(divided: dict[str, torch.Tensor]) -> str:
    """Values whose best factors are 1 everywhere lose nothing with them."""
    biases = (name for name in divided if name.endswith("v_proj.bias"))
    return next(name for name in biases if bool((divided[name] != 1).any()))


NORM = f"{LAYER}.input_layernorm.weight"


MISPLACED = {
    "norms of a layer": exchange(NORM, f"{LAYER}.post_attention_layernorm.weight"),
    "norms of two layers": exchange(NORM, "model.layers.2.input_layernorm.weight"),
    "no norm": lambda divided, _: divided.pop(NORM),
    "no bias": lambda divided, _: divided.pop(balanced_bias(divided)),
}


@FOLDS
@pytest.mark.parametrize("change", MISPLACED.values(), ids=MISPLACED)
def test_factors_folded_into_the_wrong_place_are_noticed(
    exporter: Exporter, change: Callable[..., None], recipe: str
) -> None:
    report = exporter.verify(exporter.export_with_recipe(recipe, "write_graph", folded_wrongly(change)))
    assert not report.passed
    assert report.weights.faults


@FOLDS
def test_a_search_that_clips_far_weights_is_beyond_the_limit(
    exporter: Exporter, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    true = qconvert.calibration.gptq.solve.search_steps

    def clipping(values: torch.Tensor, *rest: Any) -> Any:
        scales, zeros, errors = true(values, *rest)
        return scales / 4, zeros, errors

    monkeypatch.setattr(qconvert.calibration.gptq.solve, "search_steps", clipping)
    report = exporter.verify(exporter.export("int4", recipe=recipe))
    assert not report.passed
    assert len(report.weights.faults) > 15


@FOLDS
def test_one_changed_weight_is_noticed(exporter: Exporter, recipe: str) -> None:
    folder = exporter.export("int4", recipe=recipe)
    name = f"{LAYER}.mlp.up_proj.weight"
    data, offset, _ = stored_at(folder, f"{name}.q4")
    overwrite(folder, f"{name}.q4", 5, bytes([data.read_bytes()[offset + 5] ^ 1]))
    report = exporter.verify(folder)
    assert [fault.tensor for fault in report.weights.faults] == [name]


def test_values_of_the_graph_for_prompts_that_are_not_divided_are_noticed(exporter: Exporter) -> None:
    """Then prompts fill the cache with other values than decoding reads."""
    true = qconvert.export.write_graph

    def write(*given: Any, folding: Folding, **named: Any) -> None:
        divided = {name: factor for name, factor in folding.divided.items() if "v_proj" not in name}
        true(*given, folding=Folding(divided, folding.multiplied), **named)

    report = exporter.verify(exporter.export_with_recipe("awq", "write_graph", write, **BOTH))
    assert not report.passed
    assert any("prefill.onnx" in fault.tensor for fault in report.weights.faults)


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    """The layers that were done before stayed beside the output, under a hidden name."""
    from safetensors.torch import load_file, save_file

    folder = make_tiny_checkpoint(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    result = run("export", folder, "--precision", "int4", "--recipe", "awq", "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "model.layers.1.mlp.up_proj.weight holds NaN or Inf" in " ".join(result.output.split())
    assert {path.name for path in tmp_path.iterdir()} == {"model"}
