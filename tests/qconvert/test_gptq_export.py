"""Calibrated exports: what the folder holds, how the proof notices mistakes, and how a broken one resumes."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch

import qconvert.calibration.gptq.walk
from qconvert.calibration.gptq.store import RoundedWeights
from qconvert.calibration.text import calibration_text
from qconvert.formats.blocks import pack
from qconvert.formats.recipe import BlockFormat, Recipe
from qconvert.formats.record import RECORD_NAME
from qrun.folder.manifest import read_manifest
from tests.qconvert.building import names, run
from tests.qconvert.mutants import Exporter, overwrite, reseal, stored_at
from tests.tiny import make_tiny_checkpoint

GPTQ = pytest.mark.parametrize("recipe", ["gptq", "gptq-mixed"])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    own = (files("qconvert") / "calibration" / "text.txt").read_text(encoding="utf-8")
    file = tmp_path / "calibration.txt"
    file.write_text(own, encoding="utf-8")
    return file


@pytest.fixture
def exporter(tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Exporter:
    return Exporter(tied, tmp_path, monkeypatch)


@GPTQ
def test_the_command_publishes_a_verified_folder_and_nothing_else(
    tied: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("export", tied, "--precision", "int4", "--recipe", recipe, "--calibrate", text)
    assert result.exit_code == 0, result.output
    folder = tmp_path / f"tied-onnx-int4-{recipe}"
    assert names(tmp_path) == {"tied", "calibration.txt", folder.name}
    manifest = read_manifest(folder)
    manifest.check_files(hashes=True)
    assert manifest.verification == "passed"
    stated: Any = manifest.raw["recipe"]
    assert stated["calibration"]["text"] == "calibration.txt"
    assert stated["calibration"]["tokens"] % 256 == 0
    assert stated["linear"]["bits"] == 4
    mixed = recipe == "gptq-mixed"
    bits, block_size = (8, 64) if mixed else (4, 64)
    assert set(stated["exceptions"]) == {"down_proj", *(() if mixed else ("q_proj", "k_proj", "v_proj"))}
    assert stated["exceptions"]["down_proj"]["bits"] == bits
    assert stated["exceptions"]["down_proj"]["block_size"] == block_size
    rounded = json.loads((folder / RECORD_NAME).read_text())["float32_sha256"]
    # Three layers of seven matrices: down_proj makes up for the others, where it has 8 bits as well.
    assert len(rounded) == 21


@GPTQ
@pytest.mark.parametrize("more", [(), ("--prefill", "int8", "--kv-cache", "int8")])
def test_a_vocabulary_as_large_as_real_ones_is_verified(
    tmp_path: Path, text: Path, recipe: str, more: tuple[str, ...]
) -> None:
    """From 4,096 tokens on logits come in two steps; the limit of the second had no column for gptq."""
    text.write_text(text.read_text(encoding="utf-8")[:12000], encoding="utf-8")
    folder = make_tiny_checkpoint(tmp_path / "model", vocab_size=4096)
    options = ("--precision", "int4", "--recipe", recipe, "--calibrate", text, *more)
    result = run("export", folder, *options, "-o", tmp_path / "out", "--quiet")
    assert result.exit_code == 0, result.output
    manifest = read_manifest(tmp_path / "out")
    assert manifest.verification == "passed"
    stated: Any = manifest.raw["recipe"]
    assert (stated["shortlist"] is not None) is (recipe == "gptq")


def test_a_calibration_text_alone_chooses_gptq(tied: Path, tmp_path: Path, text: Path) -> None:
    result = run(
        "export", tied, "--precision", "int4", "--calibrate", text, "-o", tmp_path / "model", "--no-verify"
    )
    assert result.exit_code == 0, result.output
    assert read_manifest(tmp_path / "model").raw["recipe"]["calibration"]["text"] == "calibration.txt"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--precision", "int8", "--recipe", "gptq"), "is for --precision int4"),
        (("--precision", "int4", "--target", "tensorrt", "--recipe", "gptq-mixed"), "--target onnxruntime"),
        (("--precision", "int4", "--recipe", "rtn", "--calibrate", "default"), "needs no calibration"),
        (("--precision", "int4", "--calibrate", "missing.txt"), "cannot be read"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    tied: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    result = run("export", tied, *options, "-o", tmp_path / "model")
    assert result.exit_code == 1
    assert message in result.output
    assert names(tmp_path) == {"tied"}


def test_texts_that_are_none(tied: Path, tmp_path: Path) -> None:
    for content, message in ((b"\xff\xfe\x00", "not UTF-8"), (b"too short", "too few"), (b" ", "empty")):
        (tmp_path / "bad.txt").write_bytes(content)
        result = run("export", tied, "--precision", "int4", "--calibrate", tmp_path / "bad.txt")
        assert result.exit_code == 1
        assert message in result.output


def test_weights_that_are_not_finite(tmp_path: Path, text: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_tiny_checkpoint(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    result = run("export", folder, "--precision", "int4", "--calibrate", text, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "model.layers.1.mlp.up_proj.weight holds NaN or Inf" in result.output
    assert not (tmp_path / "out").exists()


def test_gptq_has_the_operators_of_plain_int4(exporter: Exporter, text: Path) -> None:
    """But for shorter blocks, and the type of the scales, which become float32 when the graph is opened."""

    def products(folder: Path) -> list[tuple[str, dict[str, Any]]]:
        graph = ir.load(folder / "model.onnx").graph
        return [
            (
                node.op_type,
                {name: each.value for name, each in node.attributes.items() if name != "block_size"},
            )
            for node in graph
            if node.op_type != "Cast"
        ]

    plain = products(exporter.export("int4", recipe="rtn"))
    assert plain == products(exporter.export("int4", recipe="gptq", calibrate=str(text), force=True))


def external_tensors(folder: Path) -> list[ir.ExternalTensor]:
    values = ir.load(folder / "model.onnx").graph.initializers.values()
    return [value.const_value for value in values if isinstance(value.const_value, ir.ExternalTensor)]


# The proof.


def test_one_changed_weight_of_a_rounded_tensor_is_noticed(exporter: Exporter, text: Path) -> None:
    """Its error is far below what GPTQ may do to a weight: only the record of what was solved can tell."""
    folder = exporter.export("int4", recipe="gptq", calibrate=str(text))
    assert exporter.verify(folder).passed
    name = "model.layers.1.mlp.up_proj.weight"
    data, offset, _ = stored_at(folder, f"{name}.q4")
    overwrite(folder, f"{name}.q4", 5, bytes([data.read_bytes()[offset + 5] ^ 1]))
    report = exporter.verify(folder)
    assert [fault.tensor for fault in report.weights.faults] == [name]
    assert "not the weights that the calibration has rounded" in report.weights.faults[0].what


@pytest.mark.parametrize("part", ["q8", "scales"])
def test_a_corrupted_block_of_the_embedding_is_noticed(exporter: Exporter, text: Path, part: str) -> None:
    folder = exporter.export("int4", recipe="gptq", calibrate=str(text))
    overwrite(folder, f"model.embed_tokens.weight.{part}", 64, bytes(range(100, 116)))
    report = exporter.verify(folder)
    assert {fault.tensor for fault in report.weights.faults} == {"model.embed_tokens.weight"}


def test_without_its_record_a_folder_does_not_pass(exporter: Exporter, text: Path) -> None:
    folder = exporter.export("int4", recipe="gptq", calibrate=str(text))
    (folder / RECORD_NAME).write_text('{"float32_sha256": {}}')
    reseal(folder)
    report = exporter.verify(folder)
    assert not report.passed
    assert len(report.weights.faults) == 21


def test_wrong_rounding_is_beyond_the_limit_of_steps(
    exporter: Exporter, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A solver that exchanges rows would record what it has done: the checkpoint tells."""
    true_solve = qconvert.calibration.gptq.walk.Means.solve

    def exchanged(self: Any, weights: Any, *rest: Any) -> Any:
        return true_solve(self, {name: weight.flip(0) for name, weight in weights.items()}, *rest)

    monkeypatch.setattr(qconvert.calibration.gptq.walk.Means, "solve", exchanged)
    report = exporter.verify(exporter.export("int4", recipe="gptq", calibrate=str(text)))
    assert not report.passed
    assert len(report.weights.faults) > 15


# How many threads there are.


@GPTQ
def test_the_number_of_threads_changes_no_bit(
    exporter: Exporter, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    found = []
    for count in (1, 3):
        monkeypatch.setattr("qconvert.parallel.usable_cores", lambda count=count: count)
        folder = exporter.export("int4", recipe=recipe, calibrate=str(text), force=True)
        found.append((folder / "model.onnx.data").read_bytes())
    assert found[0] == found[1]


# Interrupted, and resumed.


def test_an_interrupted_export_resumes_with_the_layers_that_it_has(
    exporter: Exporter, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = exporter.export("int4", recipe="gptq", calibrate=str(text))
    expected = (whole / "model.onnx.data").read_bytes()
    whole.rename(tmp_path / "whole")
    solved, add_layer = [], RoundedWeights.add_layer

    def interrupted(store: RoundedWeights, index: int, weights: Any) -> None:
        if index == 2 and len(solved) == 2:
            raise KeyboardInterrupt
        solved.append(index)
        add_layer(store, index, weights)

    monkeypatch.setattr(RoundedWeights, "add_layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        exporter.export("int4", recipe="gptq", calibrate=str(text))
    assert not whole.exists()
    assert [name for name in names(tmp_path) if name.startswith(".tied-int4.rounded-")]
    monkeypatch.setattr(
        RoundedWeights, "add_layer", lambda *given: (solved.append(given[1]), add_layer(*given))
    )
    exporter.export("int4", recipe="gptq", calibrate=str(text))
    assert solved == [0, 1, 2]
    assert (whole / "model.onnx.data").read_bytes() == expected
    assert not [name for name in names(tmp_path) if name.startswith(".")]


def test_another_text_checkpoint_or_recipe_has_another_store(tmp_path: Path) -> None:
    recipe = Recipe("int4", "float32", BlockFormat(4, 32, symmetric=False), None)
    stores = [
        RoundedWeights(tmp_path / "model", {"a": hashed}, Recipe("int4", "float32", fmt, None))
        for hashed in ("1", "2")
        for fmt in (BlockFormat(4, 32, symmetric=False), BlockFormat(4, 64, symmetric=False))
    ]
    assert len({store.folder for store in stores}) == 4
    assert RoundedWeights(tmp_path / "model", {"a": "1"}, recipe).folder == stores[0].folder


def test_a_store_gives_back_what_it_got(tmp_path: Path) -> None:
    fmt = BlockFormat(4, 32, symmetric=False, scale_dtype="bfloat16")
    store = RoundedWeights(tmp_path / "model", {}, Recipe("int4", "float32", fmt, None))
    assert names(tmp_path) == set()  # nothing before there is something to keep
    packed = pack(torch.randn(4, 96, generator=torch.Generator().manual_seed(0)), fmt)
    store.add_layer(1, {"model.layers.1.mlp.up_proj.weight": packed})
    found = store["model.layers.1.mlp.up_proj.weight"]
    for part in ("data", "scales", "zero_points"):
        assert torch.equal(getattr(found, part), getattr(packed, part))
    assert list(store) == ["model.layers.1.mlp.up_proj.weight"]
    assert store.layer(0) is None
    for absent in ("model.norm.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.x"):
        assert absent not in store
    store.remove()
    assert names(tmp_path) == set()


# The text.


def test_sequences_have_one_length_and_fit_the_context(tied: Path) -> None:
    text = calibration_text(None, tied, 320, 100)
    assert {len(sequence) for sequence in text.sequences} == {100}
    assert text.facts.text == "default"
    assert text.facts.tokens == 100 * len(text.sequences) <= 32 * 512


def test_the_packages_own_text_is_none_of_the_verification(tied: Path) -> None:
    own = (files("qconvert") / "calibration" / "more.txt").read_text(encoding="utf-8")
    for file in (files("qconvert") / "data").iterdir():
        for line in file.read_text(encoding="utf-8").splitlines():
            assert len(line) < 60 or line not in own
