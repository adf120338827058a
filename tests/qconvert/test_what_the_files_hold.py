"""If one of these fails, an export holds other numbers or end tokens than the checkpoint's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from qconvert.checkpoint.load import load_model, open_checkpoint
from qconvert.checkpoint.reference import Reference
from qconvert.checkpoint.weights import CheckpointWeights
from qrun.cli.main import main as qrun_main
from qrun.folder.manifest import read_manifest
from tests.qconvert.breaking import edit_json, edit_weights, refusal
from tests.qconvert.building import refused, run
from tests.tiny import make_tiny_checkpoint


@pytest.mark.parametrize("stated", ["bfloat16", "float16", None])
@pytest.mark.parametrize("held", ["float32", "float64", "mixed"])
def test_weights_are_not_rounded_to_the_type_that_the_config_names(
    tied: Path, tmp_path: Path, stated: str | None, held: str
) -> None:
    # float32 was rounded to bfloat16 without a word, and PASSED against the rounded model.
    def store(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            mixed = torch.float32 if "norm" in name else torch.bfloat16
            tensors[name] = tensor.to(mixed if held == "mixed" else getattr(torch, held))

    edit_weights(tied, store)
    edit_json(tied / "config.json", lambda config: config.update(dtype=stated))
    model = load_model(open_checkpoint(tied))
    for name, tensor in load_file(tied / "model.safetensors").items():
        assert model.state_dict()[name].dtype == tensor.dtype
        assert torch.equal(model.state_dict()[name], tensor)
    result = run("export", tied, "--precision", "fp32", "--output", tmp_path / "model")
    assert result.exit_code == 0, result.output
    if held == "float32" and stated:
        assert f"config.json says {stated} and the weight files hold float32" in result.output


@pytest.mark.parametrize(
    "change",
    [
        {"_attn_implementation": "flash_attention_2"},
        {"attn_implementation": "flash_attention_3"},
        {"pad_token_id": 99_999},
        {"pad_token_id": -1},
        {"return_dict": False},  # "'tuple' object has no attribute 'last_hidden_state'"
        {"output_attentions": True, "output_hidden_states": True},
        {"use_cache": None, "tp_plan": "auto", "base_model_tp_plan": 7},
        {"head_dim": None, "use_sliding_window": None},  # null is no value, of which powers could be taken
    ],
)
def test_a_config_that_names_what_is_not_here_still_loads(tied: Path, change: dict[str, Any]) -> None:
    edit_json(tied / "config.json", lambda config: config.update(change))
    assert Reference(load_model(open_checkpoint(tied))).logits([1, 2, 3]).shape == (3, 320)


def test_adapter_files_beside_merged_weights_are_not_read(tied: Path) -> None:
    (tied / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x/y"}')
    load_model(open_checkpoint(tied))


def test_an_index_without_metadata_loads(sharded: Path) -> None:
    edit_json(sharded / "model.safetensors.index.json", lambda index: index.pop("metadata"))
    load_model(open_checkpoint(sharded))


@pytest.mark.parametrize("spelling", ["<|im_end|>", {"content": "<|im_end|>", "lstrip": False}])
def test_the_tokenizers_end_token_ends_answers_too(tmp_path: Path, spelling: object) -> None:
    # A fine-tuned base model: both configs name <|endoftext|>, and its answers ran on.
    checkpoint = make_tiny_checkpoint(tmp_path / "c", eos_token_id=256)
    edit_json(checkpoint / "tokenizer_config.json", lambda settings: settings.update(eos_token=spelling))
    result = run("export", checkpoint, "--output", tmp_path / "m", "--no-verify")
    assert result.exit_code == 0, result.output
    assert read_manifest(tmp_path / "m").eos_token_ids == (256, 258)
    genai = json.loads((tmp_path / "m" / "genai_config.json").read_text())
    assert genai["model"]["eos_token_id"] == [256, 258]
    facts = json.loads(run("inspect", checkpoint, "--json").output)["facts"]
    fact = facts["tokens"]["an answer ends at"]
    assert fact["value"] == [256, 258]
    assert "the tokenizer" in fact["meaning"]
    told = " ".join(CliRunner().invoke(qrun_main, ["info", str(tmp_path / "m")]).output.split())
    assert "answers end at 256 or 258" in told


@pytest.mark.parametrize("key", ["temperature", "top_k", "top_p", "repetition_penalty", "do_sample"])
def test_null_in_generation_config_means_not_given(tied: Path, tmp_path: Path, key: str) -> None:
    edit_json(tied / "generation_config.json", lambda config: config.update({key: None}))
    result = run("export", tied, "--output", tmp_path / "m", "--no-verify")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_p": 1.5}, "top_p must be a number from 0 to 1 (off), not 1.5"),
        ({"temperature": "0.7"}, "temperature must be"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number from 1 up, not 0"),
        ({"eos_token_id": "258"}, "eos_token_id must be a token id or a list of them, not '258'"),
        ({"eos_token_id": {"a": 1}}, "eos_token_id must be a token id"),
    ],
)
def test_a_default_that_qrun_would_refuse_is_refused_before_the_work(
    tied: Path, change: dict[str, Any], message: str
) -> None:
    edit_json(tied / "generation_config.json", lambda config: config.update(change))
    error = refusal(tied)
    assert message in str(error)
    assert "generation_config.json" in str(error.where)


def test_minus_one_means_off_for_top_k_and_no_token_for_eos(tied: Path) -> None:
    edit_json(tied / "generation_config.json", lambda config: config.update(top_k=-1, eos_token_id=-1))
    checkpoint = open_checkpoint(tied)
    assert checkpoint.sampling.top_k == 0
    assert checkpoint.ends.ids == [258]
    assert "eos_token_id -1 of generation_config.json is ignored" in checkpoint.notes[0]


def test_architectures_that_are_no_list_are_refused_by_name(tied: Path) -> None:
    edit_json(tied / "config.json", lambda config: config.update(architectures=7))
    assert "architectures = 7 is not supported: a list of names is needed" in str(refusal(tied))


def test_weights_changed_in_place_are_not_dropped(tmp_path: Path) -> None:
    # Dropped pages come back from the file: an adapter merged in place would be lost.
    model = load_model(open_checkpoint(make_tiny_checkpoint(tmp_path / "c", vocab_size=2000)))
    name = "model.embed_tokens.weight"
    model.get_parameter(name).data.fill_(3.0)
    weights = CheckpointWeights(model)
    weights.release(name)
    assert bool((weights[name] == 3.0).all())


def test_values_beyond_float16_are_no_damage(tied: Path, tmp_path: Path) -> None:
    # "holds NaN or Inf: the checkpoint is damaged", of whole F32 weights, where the config says float16.
    edit_weights(tied, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].mul_(1e6))
    edit_json(tied / "config.json", lambda config: config.update(dtype="float16"))
    result = run("export", tied, "--precision", "int8", "--output", tmp_path / "m", "--no-verify")
    assert result.exit_code == 0, result.output
    result = run("export", tied, "--precision", "fp16", "--output", tmp_path / "half", "--no-verify")
    refused(result, "model.layers.1.mlp.up_proj.weight has values that float16 cannot hold (largest:")


@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_values_beyond_the_scales_of_a_target_in_float16(tied: Path, tmp_path: Path, precision: str) -> None:
    edit_weights(tied, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].fill_(3e38))
    # Calibrated on a text such weights make Inf of it, which is told as such: rounding needs none.
    recipe = ("--recipe", "rtn") if precision == "int4" else ()
    result = run(
        *("export", tied, "--precision", precision, "--target", "tensorrt", "--output", tmp_path / "m"),
        *("--no-verify", *recipe),
    )
    if precision == "fp16":
        refused(result, "model.layers.1.mlp.up_proj.weight has values that float16 cannot hold")
    else:  # its scales are bfloat16, which reach as far as float32
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_values_beyond_float32_are_named(tied: Path, tmp_path: Path, precision: str) -> None:
    def store(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.1.mlp.up_proj.weight"
        tensors[name] = tensors[name].double() * 1e40

    edit_weights(tied, store)
    result = run("export", tied, "--precision", precision, "--output", tmp_path / "m", "--no-verify")
    refused(result, "model.layers.1.mlp.up_proj.weight has values that float32 cannot hold", "e+")


def test_ranges_beyond_float32_are_named(tied: Path, tmp_path: Path) -> None:
    # From -3e38 to 3e38 no scale of 4-bit blocks reaches.
    def store(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][::2] = 3e38
        tensors["model.layers.1.mlp.up_proj.weight"][:, ::2] = -3e38

    edit_weights(tied, store)
    asked = ("export", tied, "--precision", "int4", "--output", tmp_path / "m", "--no-verify")
    what = "up_proj.weight has values that the scales of its blocks cannot hold (largest: 3e+38)"
    refused(run(*asked, "--recipe", "rtn"), what)
    refused(run(*asked), "holds NaN or Inf, or makes them of the calibration text", "--recipe rtn")
