"""Weights of integer products that make up for one another.

If these fail, int8 loses a tenth more, or a wrong code hides behind the record.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from qconvert.calibration.gptq.solve import inverse_factor, solve_steps
from qconvert.calibration.integers import ChannelWork, group_of
from qconvert.folder.tensors import save_tensors
from qconvert.formats.channels import (
    Channels,
    InputChannels,
    channel_groups,
    unpack_int8_channels,
)
from qconvert.formats.folding import FoldedInput
from qconvert.formats.layout import NonFiniteWeightError
from qconvert.formats.record import FACTORS_NAME, RECORD_NAME, read_factors, read_record
from qrun.folder.manifest import read_manifest
from tests.qconvert.building import run
from tests.qconvert.mutants import Exporter, overwrite, reseal, stored_at
from tests.qconvert.test_gptq import correlated_inputs, squares, weight
from tests.tiny import make_tiny_checkpoint

LAYER = "model.layers.1"
DOWN = FoldedInput("up", ("down",))


@pytest.fixture
def exporter(tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Exporter:
    return Exporter(tied, tmp_path, monkeypatch)


class Seen:
    """What ``statistics.InputStatistics`` gives, in groups of ``group``."""

    def __init__(self, inputs: torch.Tensor, group: int) -> None:
        whole = inputs.shape[1] // group * group
        of_all = squares(inputs)
        cuts = [slice(start, start + group) for start in range(0, whole, group)]
        self.products = [torch.stack([of_all[cut, cut] for cut in cuts])]
        if whole < inputs.shape[1]:
            self.products.append(of_all[None, whole:, whole:])
        self.squares, self.sample = of_all.diagonal(), inputs[:64]


def rounded(
    original: torch.Tensor,
    inputs: torch.Tensor,
    layout: Channels | InputChannels,
    smoothing: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Factors, and the matrix that the codes stand for, which multiplies inputs divided by the factors."""
    columns = original.shape[1]
    cuts = channel_groups(columns, layout.cuts) if isinstance(layout, InputChannels) else [slice(0, columns)]
    seen, size = Seen(inputs, group_of(cuts[0].stop)), inputs.abs().amax(0)
    work = ChannelWork({DOWN: seen}, {DOWN: size}, {"down": original}, {"down": layout}, smoothing)
    factors, found = work.done()
    packed = found["down"]
    scales = packed.scales.view(len(cuts), -1)
    parts = [unpack_int8_channels(packed.data[cut], each) for cut, each in zip(cuts, scales, strict=True)]
    return factors.get(DOWN, torch.ones(columns)), torch.cat(parts, 1), packed.scales


@pytest.mark.parametrize("layout", [Channels(), InputChannels(4)], ids=["outputs", "inputs"])
@pytest.mark.parametrize("columns", [192, 416])  # 416: cuts of 112, and a last one that is shorter
def test_products_are_nearer_than_those_of_rounding_to_nearest(
    layout: Channels | InputChannels, columns: int
) -> None:
    inputs, original = correlated_inputs(columns), weight(70, columns)
    _, ours, scales = rounded(original, inputs, layout)
    nearest = layout.pack(original, None)
    assert torch.equal(scales, nearest.scales)
    cuts = channel_groups(columns, layout.cuts) if isinstance(layout, InputChannels) else [slice(0, columns)]
    each = nearest.scales.view(len(cuts), -1)
    theirs = torch.cat([unpack_int8_channels(nearest.data[cut], part) for cut, part in zip(cuts, each)], 1)
    errors = [((found - original) @ inputs.t()).norm().item() for found in (ours, theirs)]
    # Inputs in short groups of their own leave little to make up for.
    assert errors[0] < (0.8 if isinstance(layout, Channels) else 0.95) * errors[1]
    steps = each.repeat_interleave(cuts[0].stop, 0)[:columns].t()
    assert float(((ours - original).abs() / steps).max()) < 8


def test_factors_are_folded_before() -> None:
    inputs, original = correlated_inputs(128) * torch.logspace(-2, 2, 128), weight(16, 128)
    factors, ours, _ = rounded(original, inputs, Channels(), smoothing=0.65)
    assert float(factors.max() / factors.min()) > 10
    true = inputs @ original.t()
    assert ((inputs / factors) @ ours.t() - true).norm() < 0.02 * true.norm()


def test_rows_of_zeros_and_codes_at_the_ends() -> None:
    inputs, original = correlated_inputs(64), weight(4, 64)
    original[2] = 0
    original[3] = 0.05 * torch.sign(original[3])  # every code is 127 or -127
    _, ours, scales = rounded(original, inputs, Channels())
    assert not bool(ours[2].any())
    assert scales[2] == 1
    assert float((ours[3] / scales[3]).abs().max()) <= 127


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(value: float) -> None:
    original = weight(4, 64)
    original[2, 5] = value
    with pytest.raises(NonFiniteWeightError, match="down"):
        rounded(original, correlated_inputs(64), Channels())


@pytest.mark.parametrize(
    ("columns", "group"),
    [(576, 288), (896, 224), (608, 304), (1120, 280), (48, 48), (16, 16), (577, 384), (97, 97)],
)
def test_groups_divide_what_has_one_scale(columns: int, group: int) -> None:
    assert group_of(columns) == group


def test_fixed_steps_are_solved_as_blocks_are() -> None:
    """With errors that nobody makes up for, each weight is rounded to nearest."""
    steps = 100 * torch.randn((2, 32, 10), generator=torch.Generator().manual_seed(0))
    alone = torch.stack([inverse_factor(torch.eye(32)) for _ in range(2)])
    codes = solve_steps(steps.clone(), alone, 127)
    assert torch.equal(codes, steps.round().clamp(-127, 127).to(torch.int8))


# The export and its proof.


@pytest.mark.parametrize("more", [(), ("--kv-cache", "int8"), ("--prefill", "int8", "--kv-cache", "int8")])
def test_it_is_verified_and_recorded(tmp_path: Path, more: tuple[str, ...]) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "model", vocab_size=4096)
    result = run("export", checkpoint, "--precision", "int8", *more, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "21 rounded on a text" in " ".join(result.output.split())
    manifest = read_manifest(tmp_path / "out")
    assert manifest.verification == "passed"
    assert manifest.recipe.method == "compensated"
    assert sum(name.endswith("_proj.weight") for name in read_record(tmp_path / "out")) == 21


def test_without_a_tokenizer_or_by_wish_weights_are_rounded_to_nearest(tied: Path, tmp_path: Path) -> None:
    def export(*more: str) -> Path:
        result = run(
            "export", tied, "--precision", "int8", "--no-verify", *more, "-o", tmp_path / "out", "--force"
        )
        assert result.exit_code == 0, result.output
        return tmp_path / "out"

    assert read_manifest(export()).recipe.method == "compensated"
    assert read_manifest(export("--recipe", "rtn")).recipe.method is None
    (tied / "tokenizer.json").unlink()
    folder = export()
    assert read_manifest(folder).recipe.method is None
    assert not (folder / RECORD_NAME).exists()


@pytest.mark.parametrize("part", ["mlp.down_proj.weight.int8_inputs.1", "self_attn.o_proj.weight.int8"])
@pytest.mark.parametrize("graph", ["one graph", "two graphs"])
def test_one_changed_code_is_noticed(exporter: Exporter, part: str, graph: str) -> None:
    both = {"prefill": True, "int8_kv_cache": True} if graph == "two graphs" else {}
    folder = exporter.export("int8", **both)
    name = f"{LAYER}.{part}"
    data, offset, _ = stored_at(folder, name)
    overwrite(folder, name, 5, bytes([data.read_bytes()[offset + 5] ^ 1]))
    report = exporter.verify(folder)
    assert not report.passed
    tensor = name[: name.index(".weight") + len(".weight")]
    due = {tensor, f"prefill.onnx: {tensor}"} if both else {tensor}
    assert {fault.tensor for fault in report.weights.faults} == due


def lost(record: dict[str, str]) -> None:
    del record[f"{LAYER}.mlp.up_proj.weight"]


def exchanged(record: dict[str, str]) -> None:
    one, other = (f"{LAYER}.mlp.{part}_proj.weight" for part in ("up", "gate"))
    record[one], record[other] = record[other], record[one]


@pytest.mark.parametrize("change", [lost, exchanged])
def test_another_record_is_noticed(exporter: Exporter, change: Callable[[dict[str, str]], None]) -> None:
    folder = exporter.export("int8")
    record = json.loads((folder / RECORD_NAME).read_text())
    change(record["float32_sha256"])
    (folder / RECORD_NAME).write_text(json.dumps(record))
    reseal(folder)
    report = exporter.verify(folder)
    assert not report.passed
    assert any(fault.tensor == f"{LAYER}.mlp.up_proj.weight" for fault in report.weights.faults)


@pytest.mark.parametrize("norm", ["input_layernorm", "post_attention_layernorm"])
@pytest.mark.parametrize("factor", [1.02, 0.98, 2.0])
def test_a_norm_that_is_divided_by_something_else_is_noticed(
    exporter: Exporter, norm: str, factor: float
) -> None:
    """The proof takes factors from the stored norms: a wrong one must show in the matrices behind."""
    folder = exporter.export("int8")
    name = f"{LAYER}.{norm}.weight"
    data, offset, _ = stored_at(folder, name)
    value = np.frombuffer(data.read_bytes(), np.float32, 1, offset + 12) * np.float32(factor)
    overwrite(folder, name, 12, value.astype(np.float32).tobytes())
    report = exporter.verify(folder)
    assert not report.passed
    assert report.weights.faults


@pytest.mark.parametrize("factor", [None, 0.5, 2.0])
def test_factors_of_values_are_recorded(exporter: Exporter, factor: float | None) -> None:
    """They divide what is in the KV cache; those of the other inputs are found in what they divide."""
    folder = exporter.export("int8")
    factors = read_factors(folder)
    assert set(factors) == {f"model.layers.{layer}.self_attn.v_proj.weight" for layer in range(3)}
    if factor is None:
        (folder / FACTORS_NAME).unlink()
        manifest = json.loads((folder / "qconvert.json").read_text())
        manifest["files"] = [each for each in manifest["files"] if each["path"] != FACTORS_NAME]
        (folder / "qconvert.json").write_text(json.dumps(manifest))
    else:
        factors[f"{LAYER}.self_attn.v_proj.weight"][3] *= factor
        save_tensors({name: each.bfloat16() for name, each in factors.items()}, folder / FACTORS_NAME)
    reseal(folder)
    report = exporter.verify(folder)
    assert not report.passed
    assert any("self_attn.v_proj" in fault.tensor for fault in report.weights.faults)


def test_a_scale_of_another_channel_is_noticed(exporter: Exporter) -> None:
    folder = exporter.export("int8")
    name = f"{LAYER}.self_attn.o_proj.weight.int8_scales"
    data, offset, _ = stored_at(folder, name)
    scales = np.frombuffer(data.read_bytes(), np.float32, 2, offset)
    overwrite(folder, name, 0, scales[::-1].tobytes())
    assert not exporter.verify(folder).passed


def test_codes_that_are_far_off_are_beyond_the_limit_even_if_they_are_recorded(
    exporter: Exporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    import qconvert.calibration.integers as module

    true = module.solve_steps

    def shifted(steps: torch.Tensor, upper: torch.Tensor, largest: int) -> torch.Tensor:
        return true(steps.roll(1, 1), upper.roll(1, 1), largest)

    monkeypatch.setattr(module, "solve_steps", shifted)
    report = exporter.verify(exporter.export("int8"))
    assert not report.passed
    assert len(report.weights.faults) > 15
