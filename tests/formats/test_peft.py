"""If one of these fails, an adapter of peft's is merged otherwise than peft merges it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from qconvert.checkpoint.load import load_model, open_checkpoint, with_adapters
from qconvert.checkpoint.weights import CheckpointWeights
from tests.tiny import make_tiny_checkpoint

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "two matrices": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "all linear layers": {"r": 8, "lora_alpha": 4, "target_modules": "all-linear"},
    "an expression": {"r": 4, "target_modules": r".*\.1\.mlp\.(up|down)_proj"},
    "rslora": {"r": 8, "lora_alpha": 16, "use_rslora": True, "target_modules": ALL},
    "ranks and alphas": {
        "r": 4,
        "target_modules": ALL,
        "rank_pattern": {"layers.0.self_attn.q_proj": 2, "^model.layers.1.*up_proj": 16},
        "alpha_pattern": {"down_proj": 32},
    },
    "some layers": {"r": 4, "target_modules": ALL, "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "all but some": {"r": 4, "target_modules": ALL, "exclude_modules": r".*\.0\..*"},
    "modules to save": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    "an embedding": {"r": 4, "target_modules": ["embed_tokens", "q_proj"]},
    "a head": {"r": 4, "target_modules": ["lm_head", "q_proj"]},
    "biases": {"r": 4, "target_modules": ["q_proj", "k_proj"], "bias": "lora_only"},
    "all biases": {"r": 4, "target_modules": ["q_proj"], "bias": "all"},
}


def trained(base: Path, folder: Path, seed: int, **settings: Any) -> Path:
    """An adapter that peft has made and saved, with random numbers in the place of training."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **settings)
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                change = 0.2 * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(change if "lora_" in name else parameter + change)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_tiny_checkpoint(tmp_path / "base", tie_word_embeddings=False)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_merged_as_peft_merges_it(base: Path, tmp_path: Path, kind: str) -> None:
    folder = trained(base, tmp_path / "adapter", 1, **KINDS[kind])
    due = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).merge_and_unload()
    same(CheckpointWeights(load_model(with_adapters(open_checkpoint(base), [str(folder)]))), due)


def test_several_adapters_are_added_as_peft_adds_them(base: Path, tmp_path: Path) -> None:
    one = trained(base, tmp_path / "one", 1, r=4, target_modules=ALL)
    other = trained(base, tmp_path / "other", 2, r=8, lora_alpha=4, target_modules=["q_proj", "up_proj"])
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), one, adapter_name="one")
    model.load_adapter(other, "other")
    model.base_model.set_adapter("one")
    for layer in model.modules():
        if hasattr(layer, "set_scale") and "other" in getattr(layer, "scaling", {}):
            layer.set_scale("other", 0.5)
    due = model.merge_and_unload(adapter_names=["one", "other"])
    same(CheckpointWeights(load_model(with_adapters(open_checkpoint(base), [str(one), f"{other}=0.5"]))), due)


def same(found: CheckpointWeights, due: Any) -> None:
    differences = [(found[name].float() - tensor).abs().max() for name, tensor in due.state_dict().items()]
    assert max(map(float, differences)) < 2e-6
