"""If one of these fails, a quantised checkpoint that is not covered becomes a wrong model.

Each is typed by a user: exit code 1, one message with what to do, and nothing is left behind.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from qconvert.cli import main
from tests.qconvert.breaking import edit_json, edit_weights, told
from tests.qconvert.quantising import make_awq, make_compressed, make_gptq
from tests.qconvert.quantising_floats import make_float8

Break = Callable[[Path], object]
Q0 = "model.layers.0.self_attn.q_proj"


def config(**changes: Any) -> Break:
    """Changes fields of quantization_config."""
    return lambda folder: edit_json(
        folder / "config.json", lambda raw: raw["quantization_config"].update(changes)
    )


def group(**changes: Any) -> Break:
    """Changes fields of the weights in compressed-tensors' only group."""

    def change(raw: dict[str, Any]) -> None:
        raw["quantization_config"]["config_groups"]["group_0"]["weights"].update(changes)

    return lambda folder: edit_json(folder / "config.json", change)


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Break:
    """Changes a tensor of the weight file, or removes it."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        changed = change(tensors.pop(name))
        if changed is not None:
            tensors[name] = changed.contiguous()

    return lambda folder: edit_weights(folder, edit)


def filled(value: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda found: torch.full_like(found, value)


def without_word_of_it(folder: Path) -> None:
    edit_json(folder / "config.json", lambda raw: raw.pop("quantization_config"))


def add_bias(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.bias": torch.ones(256)}))


def quantised_head(folder: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for end in ("qweight", "qzeros", "scales", "g_idx"):
            tensors[f"lm_head.{end}"] = tensors[f"{Q0}.{end}"].clone()

    edit_weights(folder, edit)


CHECKPOINTS: dict[str, tuple[Callable[..., Any], dict[str, Any], Break, str]] = {
    "bitsandbytes": (make_gptq, {}, config(quant_method="bitsandbytes"), "method bitsandbytes. Of such"),
    "hqq": (make_gptq, {}, config(quant_method="hqq"), "method hqq. Of such checkpoints, GPTQ, AWQ, compr"),
    "no method": (make_gptq, {}, config(quant_method=None), "method unnamed"),
    "NVIDIA's Model Optimizer": (
        make_float8,
        {},
        lambda folder: (
            without_word_of_it(folder),
            (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4"}}'),
        ),
        "quantised already, with method modelopt (NVFP4)",
    ),
    "nothing that says how": (
        make_gptq,
        {},
        without_word_of_it,
        "seem to be quantised already, and nothing here says how",
    ),
    "a list in its place": (
        make_gptq,
        {},
        lambda folder: edit_json(folder / "config.json", lambda raw: raw.update(quantization_config=[4])),
        "method [4]",
    ),
    "GPTQ in 2 bits": (
        make_gptq,
        {},
        config(bits=2),
        "GPTQ with bits = 2 is not supported: 4 and 8 bits are",
    ),
    "GPTQ in 3 bits": (make_gptq, {}, config(bits=3), "GPTQ with bits = 3 is not supported"),
    "GPTQ in Marlin's order": (make_gptq, {}, config(checkpoint_format="marlin"), "= 'marlin' is not"),
    "GPTQ of Marlin, the older field": (make_gptq, {}, config(is_marlin_format=True), "Marlin's order"),
    "GPTQ in groups of 0": (make_gptq, {}, config(group_size=0), "group_size = 0"),
    "GPTQ packed in int64": (make_gptq, {}, config(pack_dtype="int64"), "pack_dtype = 'int64'"),
    "GPTQ that was rotated": (make_gptq, {}, config(rotation="hadamard"), "rotation = 'hadamard' is not su"),
    "GPTQ with other overrides": (make_gptq, {}, config(dynamic={".*": {"adapter": 1}}), "dynamic = {'.*'"),
    "GPTQ with an expression that is none": (
        make_gptq,
        {},
        config(dynamic={"+:(q": {"bits": 4}}),
        "dynamic =",
    ),
    "compressed-tensors that ignores no expression": (
        make_compressed,
        {},
        config(ignore=["re:(a"]),
        "ignore =",
    ),
    "compressed-tensors whose targets are none": (
        make_compressed,
        {},
        lambda folder: edit_json(
            folder / "config.json",
            lambda raw: raw["quantization_config"]["config_groups"]["group_0"].update(targets=["re:*"]),
        ),
        "group_0.targets = ['re:*']",
    ),
    **{
        f"compressed-tensors in tiles of {tile}": (
            make_compressed,
            {},
            group(type="float", num_bits=8, strategy="block", group_size=None, block_structure=tile),
            "block_structure =",
        )
        for tile in ("ab", [0, 128], [128, 1.5], 128)
    },
    "GPTQ of another group size": (make_gptq, {}, config(group_size=64), "qzeros is I32 [4, 16], due is I32"),
    "GPTQ of other bits": (make_gptq, {}, config(bits=8), "qweight is I32 [16, 128], due is I32 [32, 128]"),
    "GPTQ with a zero point of 16": (make_gptq, {}, tensor(f"{Q0}.qzeros", filled(-1)), "a zero point of 16"),
    "GPTQ with a group that is not there": (make_gptq, {}, tensor(f"{Q0}.g_idx", filled(9)), "a group of 4"),
    "GPTQ without scales": (make_gptq, {}, tensor(f"{Q0}.scales", lambda _: None), f"{Q0}.scales is missing"),
    "GPTQ with a scale of NaN": (
        make_gptq,
        {},
        tensor(f"{Q0}.scales", lambda found: found * torch.nan),
        f"{Q0}.weight holds NaN or Inf",
    ),
    "GPTQ with a bias that is none": (make_gptq, {}, add_bias, "up_proj.bias has no place in this model"),
    "GPTQ with a tied head in codes": (make_gptq, {}, quantised_head, "lm_head is quantised by itself"),
    "AWQ in 8 bits": (make_awq, {}, config(bits=8), "AWQ with bits = 8 is not supported: 4 bits are"),
    "AWQ packed as gemv": (
        make_awq,
        {},
        config(version="gemv"),
        "version = 'gemv' is not supported: the pac",
    ),
    "AWQ in groups that do not fit": (make_awq, {}, config(group_size=96), "has no whole groups of 96"),
    "compressed-tensors of 4-bit floats": (
        make_compressed,
        {},
        config(format="nvfp4-pack-quantized"),
        "format = 'nvfp4-pack-quantized'",
    ),
    "compressed-tensors in 3 bits": (make_compressed, {}, group(num_bits=3), "num_bits = 3 is not supported"),
    "compressed-tensors with holes": (
        make_compressed,
        {},
        config(sparsity_config={"format": "sparse-24-bitmask"}),
        "weights with holes are not read",
    ),
    "compressed-tensors that were rotated": (
        make_compressed,
        {},
        config(transform_config={"config_groups": {"R1": {}}}),
        "rotated weights are not read",
    ),
    "compressed-tensors of a group that names nothing": (
        make_compressed,
        {},
        config(ignore=["re:.*q_proj"]),
        f"{Q0} is quantised, although no group of config.json names it",
    ),
    "compressed-tensors by dynamic scales": (make_compressed, {}, group(dynamic=True), "dynamic = True"),
    "FP8 of another kind": (make_float8, {}, config(fmt="e5m2"), "FP8 with fmt = 'e5m2' is not supported"),
    "FP8 without scales": (
        make_float8,
        {},
        tensor(f"{Q0}.weight_scale_inv", lambda _: None),
        f"{Q0} has no scales (weight_scale_inv or weight_scale)",
    ),
    "FP8 in other tiles": (
        make_float8,
        {},
        config(weight_block_size=[64, 64]),
        "F32 [4, 4], which is none of [[2, 2]]",
    ),
    "FP8 in tiles of nothing": (make_float8, {}, config(weight_block_size=[0]), "weight_block_size = [0]"),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_quantised_checkpoint_that_is_not_covered(tmp_path: Path, kind: str) -> None:
    make, settings, damage, message = CHECKPOINTS[kind]
    make(tmp_path / "model", **settings)
    damage(tmp_path / "model")
    assert message in told(tmp_path)


@pytest.mark.parametrize(
    ("make", "name", "bits"),
    [(make_gptq, "quantize_config.json", "bits"), (make_awq, "quant_config.json", "w_bit")],
    ids=["AutoGPTQ", "AutoAWQ"],
)
def test_fields_in_a_file_beside_a_config_without_them(
    tmp_path: Path, make: Callable[..., Any], name: str, bits: str
) -> None:
    """The first checkpoints of AutoGPTQ and AutoAWQ have them there."""
    make(tmp_path / "model")
    raw = json.loads((tmp_path / "model/config.json").read_text())
    fields = {key: value for key, value in raw.pop("quantization_config").items() if key != "quant_method"}
    fields[bits] = fields.pop("bits")
    (tmp_path / "model/config.json").write_text(json.dumps(raw))
    (tmp_path / "model" / name).write_text(json.dumps(fields))
    command = ["export", str(tmp_path / "model"), "-o", str(tmp_path / "out"), "-q"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    (tmp_path / "model" / name).write_text(json.dumps({**fields, bits: 3}))
    result = CliRunner().invoke(main, ["export", str(tmp_path / "model"), "-o", str(tmp_path / "new")])
    assert result.exit_code == 1
    assert name in result.output
