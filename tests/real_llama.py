"""The sample model as what it was before it became the sample: a Llama that was trained; and its answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import qrun

_TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def make_real_llama(sample: Path, folder: Path) -> Path:
    """The sample's own weights as a checkpoint of ``LlamaForCausalLM``, which has no biases.

    ``qconvert sample`` has given it biases of zeros, so that it is a Qwen2.

    Args:
        sample: the sample checkpoint.
        folder: where to; it must not be there.
    """
    folder.mkdir(parents=True)
    with safe_open(sample / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it has no iterator
    biases = [name for name in tensors if name.endswith(".bias")]
    assert biases
    assert not any(tensors.pop(name).any() for name in biases)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((sample / "config.json").read_text())
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    del config["use_sliding_window"]
    (folder / "config.json").write_text(json.dumps(config))
    for name in _TEXT_FILES:
        shutil.copy(sample / name, folder / name)
    return folder


def same_greedy_tokens(export: Path, checkpoint: Path, prompts: list[list[int]], tokens: int) -> None:
    """An export answers prompts with the tokens that transformers takes."""
    ours = qrun.open(export)
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    plain = {"do_sample": False, "repetition_penalty": 1.0, "temperature": None, "top_k": None, "top_p": None}
    for prompt in prompts:
        *_, answer = ours.generate(prompt, max_tokens=tokens, temperature=0, repetition_penalty=1)
        assert isinstance(answer, qrun.Answer)
        ids = torch.tensor([prompt])
        made = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **plain)
        due = made[0, len(prompt) :].tolist()
        if answer.finish_reason == "eos":  # ours leaves the end token out
            del due[-1]
        assert list(answer.token_ids) == due
