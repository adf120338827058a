"""The small files beside the graph: configuration, tokenizer, template, and what other programs read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from qconvert.checkpoint.load import Checkpoint
from qconvert.models.decoder import DecoderSpec

_COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "LICENSE",
)


def write_companions(
    checkpoint: Checkpoint, spec: DecoderSpec, folder: Path, *, for_genai: bool = True
) -> None:
    """Copy the checkpoint's own small files as they are, and add ``genai_config.json`` where it helps."""
    for name in _COPIED:
        source = checkpoint.folder / name
        if source.is_file():
            shutil.copyfile(source, folder / name)
    if not for_genai:
        return
    text = json.dumps(genai_config(checkpoint, spec), indent=2)
    (folder / "genai_config.json").write_text(text + "\n", encoding="utf-8")


def end_token_ids(checkpoint: Checkpoint) -> list[int]:
    """End tokens of config.json and generation_config.json, in this order, without doubles."""
    found: list[int] = []
    for value in ((checkpoint.generation_config or {}).get("eos_token_id"), checkpoint.config.eos_token_id):
        for token in value if isinstance(value, list) else [value]:
            if isinstance(token, int) and token not in found:
                found.append(token)
    return found


def genai_config(checkpoint: Checkpoint, spec: DecoderSpec) -> dict[str, Any]:
    """What onnxruntime-genai reads to open the folder."""
    generation = checkpoint.generation_config or {}
    ends = end_token_ids(checkpoint)
    first_end = ends[0] if ends else 0
    pad = generation.get("pad_token_id", checkpoint.config.pad_token_id)
    bos = generation.get("bos_token_id", checkpoint.config.bos_token_id)
    return {
        "model": {
            "bos_token_id": first_end if bos is None else bos,
            "context_length": spec.context_length,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": "model.onnx",
                "head_size": spec.head_size,
                "hidden_size": spec.hidden_size,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "num_attention_heads": spec.num_attention_heads,
                "num_hidden_layers": spec.num_hidden_layers,
                "num_key_value_heads": spec.num_key_value_heads,
            },
            "eos_token_id": ends if len(ends) > 1 else first_end,
            "pad_token_id": first_end if pad is None else pad,
            "type": "qwen2",
            "vocab_size": spec.vocab_size,
        },
        "search": {
            "diversity_penalty": 0.0,
            "do_sample": bool(generation.get("do_sample", False)),
            "early_stopping": True,
            "length_penalty": 1.0,
            "max_length": spec.context_length,
            "min_length": 0,
            "no_repeat_ngram_size": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": True,
            "repetition_penalty": float(generation.get("repetition_penalty", 1.0)),
            "temperature": float(generation.get("temperature", 1.0)),
            "top_k": int(generation.get("top_k", 50)),
            "top_p": float(generation.get("top_p", 1.0)),
        },
    }
