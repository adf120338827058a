"""If one of these fails, ``qconvert inspect`` misleads about what a checkpoint is, costs, or lacks."""

from __future__ import annotations

import io
import json
import math
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console
from safetensors.torch import load_file

from qconvert.checkpoint.config import load_config
from qconvert.cli import main
from qconvert.inspection.inspection import describe
from qconvert.inspection.view import readable_bytes, render
from qconvert.models.families import spec_of
from qconvert.models.recorder import expected_tensors
from tests.qconvert.breaking import POINTER, edit_json
from tests.tiny import make_tiny_checkpoint

# Qwen2.5-1.5B-Instruct as published: the old spellings, and window fields that are not in force.
QWEN25_1B5 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "initializer_range": 0.02,
    "intermediate_size": 8960,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


@pytest.fixture
def qwen25(tmp_path: Path) -> Path:
    """A published config.json, and nothing else: the weights were never downloaded."""
    folder = tmp_path / "Qwen2.5-1.5B-Instruct"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(QWEN25_1B5))
    return folder


def value_of(folder: Path, section: str, key: str) -> object:
    return describe(folder).to_json()["facts"][section][key]["value"]


def test_a_config_alone_is_explained_and_counted(qwen25: Path) -> None:
    inspection = describe(qwen25)
    assert inspection.parameters == 1_543_714_304  # as the model card counts: 1.54 billion
    assert inspection.context_length == 32768
    # 2 (key, value) * 28 layers * 2 heads * 128 numbers
    assert inspection.kv_bytes_per_token == {"fp32": 57344, "fp16": 28672, "int8": 14336}
    assert inspection.kv_bytes_full_context["fp16"] == 28672 * 32768
    facts = inspection.to_json()["facts"]
    assert facts["attention"]["num_key_value_heads"]["meaning"].startswith("6 queries share one")
    assert facts["attention"]["use_sliding_window"]["value"] is False
    assert facts["positions"]["rope_theta"]["value"] == 1e6
    assert facts["model"]["dtype"]["value"] == "bfloat16"
    assert not inspection.whole
    assert any("no safetensors weights" in problem for problem in inspection.problems)


def test_bytes_of_weights_follow_the_precision(qwen25: Path) -> None:
    sizes = describe(qwen25).weight_bytes
    assert sizes["fp32"] is not None
    assert sizes["fp16"] is not None
    assert sizes["int8"] is not None
    assert sizes["int4"] is not None
    assert abs(sizes["fp32"] - 2 * sizes["fp16"]) < 100_000  # room before tensors that begin with a page
    assert 4 * 1_543_714_304 < sizes["fp32"] < 4.02 * 1_543_714_304
    assert 1.0 < sizes["int8"] / 1_543_714_304 < 1.05  # bytes a weight: 8 bits, the embedding in 8.5
    assert 0.6 < sizes["int4"] / 1_543_714_304 < 0.85  # 5.1 bits, the embedding in 9


def test_parameters_are_those_of_the_files(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model", tie_word_embeddings=False, head_dim=32)
    stored = load_file(folder / "model.safetensors")
    assert describe(folder).parameters == sum(tensor.numel() for tensor in stored.values())


def test_sliding_window_in_force_names_its_layers(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model", sliding=True)
    facts = describe(folder).to_json()["facts"]["attention"]
    assert facts["use_sliding_window"] == {"value": True, "meaning": "in force on 2 of 3 layers"}
    assert facts["sliding_window"]["value"] == 16
    assert facts["sliding_window"]["meaning"].endswith("layers 1-2")


@pytest.mark.parametrize("stated", [64, 256])
def test_yarn_stretches_the_context(tmp_path: Path, stated: int) -> None:
    # Published checkpoints state the length before the stretch (Qwen2.5) or after it (others).
    folder = make_tiny_checkpoint(tmp_path / "model", yarn=True, max_position_embeddings=stated)
    assert describe(folder).context_length == 256
    assert "4.0 from 64" in describe(folder).to_json()["facts"]["positions"]["rope_type"]["meaning"]


def test_special_tokens_and_generation_defaults_of_both_files(tmp_path: Path) -> None:
    facts = describe(make_tiny_checkpoint(tmp_path / "model")).to_json()["facts"]
    assert facts["tokens"]["eos_token_id"] == {"value": 258, "meaning": "<|im_end|>"}
    generation = facts["generation defaults"]
    assert generation["eos_token_id"]["value"] == [258, 256]
    assert generation["eos_token_id"]["meaning"] == "<|im_end|> <|endoftext|>, with config.json's"
    assert generation["temperature"]["value"] == 0.7
    assert "259 are in use, 61 padding" in facts["tokens"]["vocab_size"]["meaning"]


def test_a_tokenizer_larger_than_the_embedding_is_told(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model", vocab_size=257, eos_token_id=256)
    assert "TOO FEW" in str(describe(folder).to_json()["facts"]["tokens"]["vocab_size"]["meaning"])


def test_the_state_of_every_file(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model", sharded=True, tie_word_embeddings=False)
    first, second, third, *others = sorted(path.name for path in folder.glob("model-*.safetensors"))
    (folder / first).write_text(POINTER)
    (folder / second).write_bytes((folder / second).read_bytes()[:-1])
    (folder / third).unlink()
    (folder / "generation_config.json").write_text("{")
    inspection = describe(folder)
    states = {state.name: state.status for state in inspection.files}
    assert states == {
        "config.json": "whole",
        "generation_config.json": "garbage",
        "tokenizer.json": "whole",
        "tokenizer_config.json": "whole",
        "chat_template.jinja": "missing",
        "model.safetensors.index.json": "whole",
        first: "pointer",
        second: "truncated",
        third: "missing",
        **dict.fromkeys(others, "whole"),
    }
    assert len(inspection.problems) == 4


def test_tensors_that_do_not_fit_are_problems(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model")
    edit_json(folder / "config.json", lambda config: config.update(intermediate_size=256))
    problems = describe(folder).problems
    assert len(problems) == 9
    assert all("mlp" in problem for problem in problems)


def test_the_command_prints_one_json_object_alone_and_exits_0(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model")
    result = CliRunner().invoke(main, ["inspect", str(folder), "--json"])
    assert result.exit_code == 0
    assert result.stderr == ""
    assert json.loads(result.stdout) == json.loads(json.dumps(describe(folder).to_json()))


def test_the_command_exits_1_for_a_broken_checkpoint_and_says_what_to_do(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model")
    (folder / "model.safetensors").write_text(POINTER)
    result = CliRunner().invoke(main, ["inspect", str(folder)])
    assert result.exit_code == 1
    assert "The checkpoint is not whole" in result.stdout
    assert "git lfs pull" in result.stdout


def test_the_command_refuses_another_architecture_without_a_traceback(qwen25: Path) -> None:
    edit_json(qwen25 / "config.json", lambda config: config.update(model_type="gpt2"))
    command = [sys.executable, "-m", "qconvert.cli", "inspect", str(qwen25)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: This checkpoint is another architecture")
    assert "Traceback" not in done.stderr


def test_the_view_fits_80_columns(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model", sharded=True, yarn=True, sliding=True)
    (folder / "tokenizer.json").unlink()
    out = io.StringIO()
    render(describe(folder), Console(file=out, width=80))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("num_key_value_heads") for line in lines)
    assert "tokenizer.json is missing: text cannot become token ids" in out.getvalue()


def test_readable_bytes() -> None:
    sizes = {0: "0 B", 999: "999 B", 1500: "1.5 kB", 3_087_467_144: "3.1 GB", 5 * 10**15: "5000.0 TB"}
    assert {size: readable_bytes(size) for size in sizes} == sizes


def test_a_checkpoint_larger_than_memory_is_inspected(qwen25: Path) -> None:
    # Qwen2.5-72B's shape in a sparse file: 145 GB that nobody could load here.
    shape = {
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_hidden_layers": 80,
        "tie_word_embeddings": False,
    }
    shape |= {
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
        "max_window_layers": 70,
    }
    edit_json(qwen25 / "config.json", lambda config: config.update(shape))
    header, end = {}, 0
    for name, dimensions in expected_tensors(spec_of(load_config(qwen25))).items():
        begin, end = end, end + 2 * math.prod(dimensions)
        header[name] = {"dtype": "BF16", "shape": dimensions, "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    with (qwen25 / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + end)
    inspection = describe(qwen25)
    assert inspection.parameters == 72_706_203_648
    assert [problem for problem in inspection.problems if "safetensors" in problem] == []
