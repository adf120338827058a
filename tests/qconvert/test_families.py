"""If these fail, a family of models is more than a file and a row, or one is read with another's tensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import qrun
from qconvert.checkpoint.config import load_config
from qconvert.checkpoint.load import open_checkpoint
from qconvert.cli import main
from qconvert.errors import QconvertError
from qconvert.export import ExportOptions, export
from qconvert.lowering.ort.decoder import OnnxRuntimeLowering
from qconvert.models.decoder import lower_prompt
from qconvert.models.families import FAMILIES, find_family, spec_of
from qconvert.models.qwen2 import QWEN2
from qconvert.models.recorder import expected_tensors, tensor_groups
from qconvert.progress import Progress
from qconvert.recipes.forecast import parameter_count
from qrun.folder.manifest import read_manifest
from tests.qconvert.breaking import edit_json, refusal
from tests.tiny import make_tiny_checkpoint

OTHERS = ("qwen3", "llama")
OPTIONS: list[dict[str, Any]] = [
    {"precision": "fp32"},
    {"precision": "fp16"},
    {"precision": "int8"},
    {"precision": "int8", "int8_kv_cache": True},
    {"precision": "int4"},
    {"precision": "int4", "recipe": "gptq"},
    {"precision": "int4", "prefill": True, "int8_kv_cache": True},
    {"target": "tensorrt", "precision": "bf16"},
    {"target": "tensorrt", "precision": "fp32"},
    {"target": "tensorrt", "precision": "int4"},
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny checkpoint of each family, made once; not to be changed."""
    root = tmp_path_factory.mktemp("families")
    return cache(lambda family: make_tiny_checkpoint(root / family, family=family))


@pytest.fixture
def qwen3(made: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy, to be broken."""
    return Path(shutil.copytree(made("qwen3"), tmp_path / "qwen3"))


# What differs most from fp32; `make test-slow` exports the others.
AT_ONCE = ({"precision": "int8"}, {"target": "tensorrt", "precision": "bf16"})


@pytest.mark.parametrize(
    "options",
    [pytest.param(each, marks=() if each in AT_ONCE else pytest.mark.slow, id=str(each)) for each in OPTIONS],
)
@pytest.mark.parametrize("family", OTHERS)
def test_every_family_passes_every_proof(
    made: Callable[[str], Path], tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    chosen = ExportOptions(output=tmp_path / "model", **options)
    done = export(str(made(family)), chosen, Progress(quiet=True))
    assert done.report is not None
    assert done.report.passed
    raw = json.loads((tmp_path / "model" / "qconvert.json").read_text())
    assert raw["model"]["architecture"] == FAMILIES[family].architecture


@pytest.mark.parametrize("family", OTHERS)
def test_answers_are_those_of_transformers(made: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    folder = made(family)
    export(str(folder), ExportOptions("fp32", output=tmp_path / "model", verify=False), Progress(quiet=True))
    model = qrun.open(tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for prompt in ([72, 101, 108, 108, 111], list(range(40, 140))):
        wanted = theirs.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=24, repetition_penalty=1.0
        )[0, len(prompt) :]
        *_, answer = model.generate(prompt, do_sample=False, max_tokens=24, repetition_penalty=1.0)
        assert isinstance(answer, qrun.Answer)
        assert answer.token_ids == tuple(wanted.tolist())[: len(answer.token_ids)]
        assert len(answer.token_ids) + 1 >= len(wanted)  # the end token is no part of an answer


def test_yarn_is_as_the_cards_of_qwen3_describe_it(tmp_path: Path) -> None:
    """They state the trained context, a longer one in config.json, and a factor: the product counts."""
    folder = make_tiny_checkpoint(tmp_path / "qwen3", family="qwen3", max_position_embeddings=80)
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    edit_json(folder / "config.json", lambda raw: raw.pop("rope_parameters"))
    edit_json(folder / "config.json", lambda raw: raw.update(rope_scaling=rope, rope_theta=1e6))
    done = export(str(folder), ExportOptions("fp32", output=tmp_path / "model"), Progress(quiet=True))
    assert done.report is not None
    assert done.report.passed
    assert read_manifest(tmp_path / "model").model.context_length == 256


@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_may_have_a_head_of_its_own(tmp_path: Path, tied: bool) -> None:
    folder = make_tiny_checkpoint(tmp_path / "llama", family="llama", tie_word_embeddings=tied)
    for precision in ("fp32", "int4"):
        output = tmp_path / precision
        done = export(str(folder), ExportOptions(precision, output=output), Progress(quiet=True))
        assert done.report is not None
        assert done.report.passed


def test_a_window_in_a_config_of_llama_means_nothing(tmp_path: Path) -> None:
    """transformers' Llama sees everything, whatever another program has left in config.json."""
    folder = make_tiny_checkpoint(tmp_path / "llama", family="llama")
    windows = {"sliding_window": 8, "layer_types": ["sliding_attention"] * 3, "use_sliding_window": True}
    edit_json(folder / "config.json", lambda raw: raw.update(windows))
    assert spec_of(load_config(folder)).sliding_windows == (None, None, None)
    done = export(str(folder), ExportOptions("fp32", output=tmp_path / "model"), Progress(quiet=True))
    assert done.report is not None
    assert done.report.passed


def test_a_graph_that_takes_one_norm_for_the_other_fails(
    qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = OnnxRuntimeLowering.norm_heads

    def swapped(self: Any, qkv: Any, query_weight: str, key_weight: str) -> Any:
        return real(self, qkv, key_weight, query_weight)

    monkeypatch.setattr(OnnxRuntimeLowering, "norm_heads", swapped)
    with pytest.raises(QconvertError, match="does not compute what PyTorch computes"):
        export(str(qwen3), ExportOptions("fp32", output=tmp_path / "model"), Progress(quiet=True))


@pytest.mark.parametrize(
    ("family", "settings", "named"),
    [
        ("qwen3", {"attention_bias": True}, "attention_bias = True is not supported"),
        ("llama", {"attention_bias": True}, "attention_bias = True is not supported"),
        ("llama", {"mlp_bias": True}, "mlp_bias = True is not supported"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ("qwen3", {"model_type": "qwen3_moe"}, "This checkpoint is a mixture of experts"),
        ("qwen2", {"model_type": "qwen2_moe"}, "This checkpoint is a mixture of experts"),
        ("qwen3", {"model_type": "qwen3_5_text"}, r"This checkpoint is the family Qwen3\.5"),
        ("qwen2", {"model_type": "qwen2_5_vl"}, "This checkpoint is a model that reads more than text"),
        ("llama", {"model_type": "mistral"}, "This checkpoint is the family Mistral"),
        ("qwen2", {"model_type": "gpt2"}, "This checkpoint is another architecture"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "This checkpoint is another archit"),
        ("qwen3", {"architectures": ["Qwen3ForTokenClassification"]}, "This checkpoint is another architect"),
    ],
    ids=str,
)
def test_what_a_family_does_not_cover_is_refused_by_name(
    made: Callable[[str], Path], tmp_path: Path, family: str, settings: dict[str, Any], named: str
) -> None:
    folder = Path(shutil.copytree(made(family), tmp_path / "broken"))
    edit_json(folder / "config.json", lambda raw: raw.update(settings))
    with pytest.raises(QconvertError, match=named) as error:
        load_config(folder)
    assert "Qwen3ForCausalLM is supported" in (error.value.hint or "")
    done = CliRunner().invoke(main, ["export", str(folder), "--output", str(tmp_path / "model")])
    assert done.exit_code == 1
    assert not (tmp_path / "model").exists()


def test_a_tensor_of_another_family_has_no_place(qwen3: Path, made: Callable[[str], Path]) -> None:
    llama = json.loads((made("llama") / "config.json").read_text())
    (qwen3 / "config.json").write_text(json.dumps({**llama, "head_dim": 32}))
    with pytest.raises(QconvertError, match=r"_norm\.weight has no place in LlamaForCausalLM"):
        open_checkpoint(qwen3)


def test_pickles_of_any_family_are_converted_as_the_message_says(qwen3: Path, tmp_path: Path) -> None:
    """The message named Qwen2's class, to which another family's weights are missing or unknown."""
    before = load_file(qwen3 / "model.safetensors")
    torch.save(before, qwen3 / "pytorch_model.bin")
    (qwen3 / "model.safetensors").unlink()
    hint = refusal(qwen3).hint or ""
    code = hint[hint.index("transformers.") : hint.index(", then copy")]
    exec(f"import transformers; {code}", {"NEW_FOLDER": tmp_path / "converted"})
    assert load_config(tmp_path / "converted").model_type == "qwen3"
    assert load_file(tmp_path / "converted" / "model.safetensors").keys() == before.keys()


def test_a_family_is_found_by_its_type_and_its_architecture() -> None:
    assert find_family("qwen2", None) is QWEN2
    assert find_family("qwen2", ["Other", "Qwen2ForCausalLM"]) is QWEN2
    assert find_family("qwen2", ["Qwen2ForTokenClassification"]) is None
    assert find_family("mistral", None) is None
    assert find_family(["qwen2"], None) is None


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_decoder_asks_for_all_tensors_that_a_checkpoint_should_have(
    tmp_path: Path, tied: bool, family: str
) -> None:
    folder = make_tiny_checkpoint(tmp_path / "c", family=family, tie_word_embeddings=tied)
    spec = spec_of(load_config(folder))
    tensors = expected_tensors(spec)
    assert {name for group in tensor_groups(spec) for name in group} == set(tensors)
    assert parameter_count(spec) == sum(torch.Size(shape).numel() for shape in tensors.values())
    last = f"model.layers.{spec.num_hidden_layers - 1}"
    behind = (f"{last}.self_attn.o_proj", f"{last}.mlp", f"{last}.post", "model.norm", "lm_head")
    prompts = {name for group in tensor_groups(spec, lower_prompt) for name in group}
    assert prompts == {name for name in tensors if not name.startswith(behind)}
