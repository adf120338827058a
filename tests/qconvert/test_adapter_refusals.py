"""If one of these fails, an adapter that is not covered, or named wrongly, becomes a wrong model.

Each is typed by a user: exit code 1, one message with what to do, and nothing is left behind.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.qconvert.adapting import PREFIX, make_adapter
from tests.qconvert.breaking import POINTER, edit_json, edit_weights, told
from tests.tiny import make_tiny_checkpoint

Break = Callable[[Path], object]
Q0 = "model.layers.0.self_attn.q_proj"


def adapter_config(**changes: Any) -> Break:
    return lambda folder: edit_json(folder / "adapter_config.json", lambda raw: raw.update(changes))


def adapter_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Break:
    def edit(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        file.rename(folder / "model.safetensors")
        edit_weights(folder, change)
        (folder / "model.safetensors").rename(file)

    return edit


def text_in_place_of(name: str, text: str) -> Break:
    return lambda folder: (folder / name).write_text(text)


def only_pickles(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def one_for_another(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{PREFIX}model.layers.7.mlp.up_proj.lora_A.weight"] = torch.zeros(4, 64)
    tensors[f"{PREFIX}model.layers.7.mlp.up_proj.lora_B.weight"] = torch.zeros(128, 4)


ADAPTERS: dict[str, tuple[dict[str, Any], Break, str]] = {
    "DoRA": ({}, adapter_config(use_dora=True), "an adapter with use_dora = True is not merged: DoRA scales"),
    "IA3": ({}, adapter_config(peft_type="IA3"), "peft_type = 'IA3' is not merged: LoRA alone is merged"),
    "a classifier": ({}, adapter_config(task_type="SEQ_CLS"), "another task than generating text"),
    "PiSSA": ({}, adapter_config(init_lora_weights="pissa"), "init_lora_weights = 'pissa' is not merged"),
    "QALoRA": ({}, adapter_config(use_qalora=True), "use_qalora = True"),
    "activated LoRA": ({}, adapter_config(alora_invocation_tokens=[1, 2]), "from certain tokens on only"),
    "biases inside": ({}, adapter_config(lora_bias=True), "lora_bias = True"),
    "doubled layers": ({}, adapter_config(layer_replication=[[0, 1]]), "it doubles layers"),
    "rows of the embedding": (
        {},
        adapter_config(trainable_token_indices=[5]),
        "single rows of the embedding",
    ),
    "a field of next year": (
        {},
        adapter_config(use_xlora=True),
        "use_xlora = True is not merged: this field",
    ),
    "a rank that is none": (
        {},
        adapter_config(r=0),
        "r = 0 is not merged: a positive whole number is needed",
    ),
    "an alpha that is none": ({}, adapter_config(lora_alpha="big"), "lora_alpha = 'big'"),
    "an expression that is none": (
        {},
        adapter_config(target_modules="(q_proj"),
        "target_modules = '(q_proj'",
    ),
    # Each was a traceback: peft makes expressions of these names.
    "a module to save that is no expression": (
        {},
        adapter_config(modules_to_save=["lm_head("]),
        "= ['lm_head('",
    ),
    "a list of layers that is no expression": (
        {},
        adapter_config(layers_to_transform=[0], layers_pattern=["*"]),
        "layers_pattern = ['*']",
    ),
    "another rank": (
        {},
        adapter_config(r=8),
        "lora_A.weight is F32 [4, 64], due is [8, 64] for this model and",
    ),
    "targets without matrices": ({}, adapter_config(target_modules=["q_proj", "o_proj"]), "has matrices for"),
    "matrices without targets": ({}, adapter_config(target_modules=["q_proj"]), "has matrices for"),
    "another model": (
        {},
        adapter_weights(one_for_another),
        "layers.7.mlp.up_proj.weight, which this model do",
    ),
    "half a pair": (
        {},
        adapter_weights(lambda tensors: tensors.pop(f"{PREFIX}{Q0}.lora_B.weight")),
        f"{Q0}.lora_B.weight is missing",
    ),
    "a tied embedding": (
        {"modules": "embed_tokens", "target_modules": ["embed_tokens"]},
        lambda folder: None,
        "embedding and head are one tensor",
    ),
    "no configuration": (
        {},
        lambda folder: (folder / "adapter_config.json").unlink(),
        "There is no adapter_c",
    ),
    "no weights": (
        {},
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        "The adapter has no ad",
    ),
    "pickles": ({}, only_pickles, "pickle weights only, which can run code when loaded"),
    "no JSON": ({}, text_in_place_of("adapter_config.json", "{oops"), "malformed JSON in line 1"),
    "a Git LFS pointer": ({}, text_in_place_of("adapter_model.safetensors", POINTER), "git lfs pull"),
    "no safetensors": ({}, text_in_place_of("adapter_model.safetensors", "x" * 99), "not a safetensors file"),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_that_is_not_covered(tmp_path: Path, kind: str) -> None:
    settings, damage, message = ADAPTERS[kind]
    make_tiny_checkpoint(tmp_path / "model")
    make_adapter(tmp_path / "mine", tmp_path / "model", **settings)
    damage(tmp_path / "mine")
    assert message in told(tmp_path, "--adapter", str(tmp_path / "mine"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{}/mine=often", "'often' is no weight for an adapter"),
        ("{}/mine=0", "'0' is no weight"),
        ("{}/mine=nan", "'nan' is no weight"),
        ("{}/nowhere", "is not there"),
        ("{}/mine/adapter_config.json", "is a file, not an adapter's folder"),
    ],
)
def test_an_adapter_that_is_named_wrongly(tmp_path: Path, given: str, message: str) -> None:
    make_tiny_checkpoint(tmp_path / "model")
    make_adapter(tmp_path / "mine", tmp_path / "model")
    assert message in told(tmp_path, "--adapter", given.format(tmp_path))


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"saved": ("norm",), "modules_to_save": ["norm"]}, ("mine=0.5",)),
        ({"biases": True, "bias": "lora_only"}, ("mine", "another")),
    ],
    ids=["with a weight", "beside another"],
)
def test_what_is_replaced_as_a_whole_stands_alone(
    tmp_path: Path, settings: dict[str, Any], names: tuple[str, ...]
) -> None:
    make_tiny_checkpoint(tmp_path / "model")
    make_adapter(tmp_path / "mine", tmp_path / "model", **settings)
    make_adapter(tmp_path / "another", tmp_path / "model")
    given = [part for name in names for part in ("--adapter", f"{tmp_path / name}")]
    assert "as a whole, which no weight and no other adapter goes with" in told(tmp_path, *given)
