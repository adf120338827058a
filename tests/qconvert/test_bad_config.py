"""If one of these fails, a model that an export does not cover becomes a wrong one, or is told unclearly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.qconvert.breaking import POINTER, edit_json, refusal
from tests.tiny import make_tiny_checkpoint


def test_missing_folder(tmp_path: Path) -> None:
    assert "There is no folder" in str(refusal(tmp_path / "absent"))


def test_a_file_instead_of_a_folder(tied: Path) -> None:
    assert "is a file" in str(refusal(tied / "model.safetensors"))


def test_no_config(tied: Path) -> None:
    (tied / "config.json").unlink()
    assert "There is no config.json" in str(refusal(tied))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model_type": "qwen2",\n oops}', "malformed JSON in line 2"),
        ("[]", "holds a JSON list"),
        ("", "empty"),
        ("\xff\xfe", "not UTF-8 text"),
        ("[" * 100_000, "malformed JSON"),
        (POINTER, "git lfs pull"),
    ],
)
def test_malformed_config(tied: Path, text: str, message: str) -> None:
    (tied / "config.json").write_text(text, encoding="latin-1")
    error = refusal(tied)
    assert message in str(error)
    assert error.where == str(tied / "config.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["MistralForCausalLM"], "model_type": "mistral"},
            "MistralForCausalLM, model_type mistral",
        ),
        ({"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}, "Qwen3MoeForCausalLM"),
        ({"architectures": ["Qwen2ForSequenceClassification"]}, "Qwen2ForSequenceClassification"),
        ({"model_type": None}, "model_type None"),
        ({"max_position_embeddings": 1}, "a prompt and an answer need a context of two tokens"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "method gptq"),
        ({"quantization_config": {"quant_method": "awq"}}, "method awq"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "rope_type = 'spiral'"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type = 'dynamic'",
        ),
        ({"rope_scaling": {"type": "mrope"}, "rope_parameters": None}, "rope_type = 'mrope'"),
        (
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 8,
                    "long_factor": [1.0] * 8,
                    "original_max_position_embeddings": 64,
                }
            },
            "rope_type = 'longrope'",
        ),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "factor"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": -1}}, "rope_theta = -1"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"is_causal": False}, "is_causal = False"),
        ({"hidden_size": 66}, "hidden_size"),
        ({"num_key_value_heads": 3}, "3 key/value heads"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": "three"}, "num_hidden_layers"),
        ({"head_dim": 15}, "head"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["chunked_attention"] * 3}, "layer_types"),
        ({"layer_types": ["sliding_attention"] * 3}, "sliding_window = None"),
    ],
)
def test_unsupported_config(tied: Path, change: dict[str, Any], message: str) -> None:
    edit_json(tied / "config.json", lambda config: config.update(change))
    error = refusal(tied)
    assert message in str(error)
    assert "config.json" in str(error.where)


def test_another_architecture_is_told_what_is_supported(tied: Path) -> None:
    edit_json(tied / "config.json", lambda config: config.update(model_type="gpt2"))
    for family in ("Qwen2.5-Coder", "Qwen2.5-Math", "DeepSeek-R1-Distill-Qwen", "QwQ"):
        assert family in str(refusal(tied))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("beta_fast", "x"),
        ("beta_slow", ["a"]),
        ("attention_factor", "x"),
        ("attention_factor", float("inf")),
        ("factor", "x"),
        ("beta_fast", float("nan")),
        ("partial_rotary_factor", "x"),
    ],
)
def test_rope_values_that_have_no_angles_are_refused_before_the_work(
    tmp_path: Path, key: str, value: object
) -> None:
    # transformers meets them where the cosines are computed, which was after the weights were loaded.
    folder = make_tiny_checkpoint(tmp_path / "c", yarn=True)
    edit_json(folder / "config.json", lambda config: config["rope_parameters"].update({key: value}))
    error = refusal(folder)
    assert "refuses this configuration" in error.what or "is not supported" in error.what
    assert str(folder / "config.json") in str(error.where)


def test_a_number_of_layers_that_would_take_hours_to_lay_out(tied: Path) -> None:
    edit_json(tied / "config.json", lambda config: config.update(num_hidden_layers=10**9))
    assert "num_hidden_layers = 1000000000 is not supported: more than 1,000 layers" in refusal(tied).what
