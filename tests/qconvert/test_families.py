"""If these fail, a family of models is more than a file and a row, or one is read with another's tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qconvert.checkpoint.config import load_config
from qconvert.checkpoint.load import open_checkpoint
from qconvert.errors import QconvertError
from qconvert.export import ExportOptions, export
from qconvert.lowering.ort.decoder import OnnxRuntimeLowering
from qconvert.models import families
from qconvert.models.decoder import lower_prompt
from qconvert.models.families import find_family
from qconvert.models.family import Family, Unsupported
from qconvert.models.qwen2 import QWEN2
from qconvert.models.recorder import expected_tensors, tensor_groups
from qconvert.progress import Progress
from qconvert.recipes.forecast import parameter_count
from tests.qconvert.breaking import edit_json, refusal
from tests.tiny import make_tiny_checkpoint, tiny_config, write_tiny_tokenizer


def _biased(config: Any) -> Iterator[Unsupported]:
    if config.attention_bias:
        yield Unsupported("attention_bias", config.attention_bias, "no projection has a bias")


# As a file of ``models/`` would state it: normed heads of a size of their own, and no biases.
NORMED_HEADS = Family("Qwen3", "qwen3", "Qwen3", qkv_bias=False, qk_norm=True, unsupported=_biased)


@pytest.fixture
def normed_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny checkpoint of that family, which has a row for this test."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    monkeypatch.setitem(families.FAMILIES, "qwen3", NORMED_HEADS)
    model = Qwen3ForCausalLM(Qwen3Config(**tiny_config(), head_dim=32, attention_bias=False))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.2 * noise)
    folder = tmp_path / "normed"
    model.save_pretrained(folder)
    write_tiny_tokenizer(folder)
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "fp32"},
        {"precision": "fp16"},
        {"precision": "int8"},
        {"precision": "int4"},
        {"precision": "int4", "prefill": True, "int8_kv_cache": True},
        {"target": "tensorrt", "precision": "bf16"},
        {"target": "tensorrt", "precision": "fp32"},
    ],
    ids=str,
)
def test_a_family_that_norms_its_heads_is_one_row_and_passes_every_proof(
    normed_heads: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    chosen = ExportOptions(output=tmp_path / "model", **options)
    done = export(str(normed_heads), chosen, Progress(quiet=True))
    assert done.report is not None
    assert done.report.passed


def test_a_graph_that_takes_one_norm_for_the_other_fails(
    normed_heads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = OnnxRuntimeLowering.norm_heads

    def swapped(self: Any, qkv: Any, query_weight: str, key_weight: str) -> Any:
        return real(self, qkv, key_weight, query_weight)

    monkeypatch.setattr(OnnxRuntimeLowering, "norm_heads", swapped)
    with pytest.raises(QconvertError, match="does not compute what PyTorch computes"):
        export(str(normed_heads), ExportOptions("fp32", output=tmp_path / "model"), Progress(quiet=True))


def test_what_a_family_does_not_cover_is_refused_by_name(normed_heads: Path) -> None:
    edit_json(normed_heads / "config.json", lambda raw: raw.update(attention_bias=True))
    with pytest.raises(QconvertError, match="attention_bias = True is not supported"):
        load_config(normed_heads)


def test_a_tensor_of_another_family_has_no_place(normed_heads: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(families.FAMILIES, "qwen3", replace(NORMED_HEADS, qk_norm=False))
    with pytest.raises(QconvertError, match=r"_norm\.weight has no place in Qwen3ForCausalLM"):
        open_checkpoint(normed_heads)


def test_pickles_of_any_family_are_converted_as_the_message_says(normed_heads: Path, tmp_path: Path) -> None:
    """The message named Qwen2's class, to which another family's weights are missing or unknown."""
    before = load_file(normed_heads / "model.safetensors")
    torch.save(before, normed_heads / "pytorch_model.bin")
    (normed_heads / "model.safetensors").unlink()
    hint = refusal(normed_heads).hint or ""
    code = hint[hint.index("transformers.") : hint.index(", then copy")]
    exec(f"import transformers; {code}", {"NEW_FOLDER": tmp_path / "converted"})
    assert load_config(tmp_path / "converted").model_type == "qwen3"
    assert load_file(tmp_path / "converted" / "model.safetensors").keys() == before.keys()


def test_a_family_is_found_by_its_type_and_its_architecture() -> None:
    assert find_family("qwen2", None) is QWEN2
    assert find_family("qwen2", ["Other", "Qwen2ForCausalLM"]) is QWEN2
    assert find_family("qwen2", ["Qwen2ForTokenClassification"]) is None
    assert find_family("llama", None) is None
    assert find_family(["qwen2"], None) is None


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", [QWEN2, NORMED_HEADS], ids=lambda family: family.name)
def test_the_decoder_asks_for_all_tensors_that_a_checkpoint_should_have(
    tmp_path: Path, tied: bool, family: Family
) -> None:
    spec = family.spec(load_config(make_tiny_checkpoint(tmp_path / "c", tie_word_embeddings=tied)))
    tensors = expected_tensors(spec)
    assert {name for group in tensor_groups(spec) for name in group} == set(tensors)
    assert parameter_count(spec) == sum(torch.Size(shape).numel() for shape in tensors.values())
    last = f"model.layers.{spec.num_hidden_layers - 1}"
    behind = (f"{last}.self_attn.o_proj", f"{last}.mlp", f"{last}.post", "model.norm", "lm_head")
    prompts = {name for group in tensor_groups(spec, lower_prompt) for name in group}
    assert prompts == {name for name in tensors if not name.startswith(behind)}
