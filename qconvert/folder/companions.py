"""The small files beside the graph: configuration, tokenizer, template, and what other programs read."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

from qconvert.checkpoint.load import Checkpoint
from qconvert.checkpoint.quantised.scheme import QUANTISATION_KEYS
from qconvert.checkpoint.tokenizer import tokenizer_json
from qconvert.models.spec import DecoderSpec
from qrun.text.chat_template import ADDITIONAL_TEMPLATES

_COPIED = (
    "config.json",
    "generation_config.json",
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
    templates = sorted((checkpoint.folder / ADDITIONAL_TEMPLATES).glob("*.jinja"))
    if templates:
        (folder / ADDITIONAL_TEMPLATES).mkdir()
    for name in (*_COPIED, *(f"{ADDITIONAL_TEMPLATES}/{path.name}" for path in templates)):
        source = checkpoint.folder / name
        if source.is_file():
            # Many programs cannot read a file with a byte order mark, so the copy has none.
            content = source.read_bytes().removeprefix(codecs.BOM_UTF8)
            if name == "config.json" and checkpoint.computed:
                content = _without_quantisation(content)
            (folder / name).write_bytes(content)
    tokenizer = tokenizer_json(checkpoint.folder)
    if tokenizer is not None:
        (folder / "tokenizer.json").write_bytes(tokenizer)
    if not for_genai:
        return
    text = json.dumps(genai_config(checkpoint, spec), indent=2)
    (folder / "genai_config.json").write_text(text + "\n", encoding="utf-8")


def _without_quantisation(content: bytes) -> bytes:
    """config.json of a quantised checkpoint: who loads the folder must not look for its tensors."""
    config = json.loads(content)
    kept = {key: value for key, value in config.items() if key not in QUANTISATION_KEYS}
    return (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()


def genai_config(checkpoint: Checkpoint, spec: DecoderSpec) -> dict[str, Any]:
    """What onnxruntime-genai reads to open the folder."""
    generation, sampling = checkpoint.generation_config or {}, checkpoint.sampling
    ends = checkpoint.ends.ids
    tokens: dict[str, Any] = {} if not ends else {"eos_token_id": ends if len(ends) > 1 else ends[0]}
    for key in ("bos_token_id", "pad_token_id"):
        named = (generation.get(key), getattr(checkpoint.config, key), *ends)
        usable = [token for token in named if type(token) is int and 0 <= token < spec.vocab_size]
        if usable:
            tokens[key] = usable[0]
    return {
        "model": {
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
            **tokens,
            "type": spec.model_type,
            "vocab_size": spec.vocab_size,
        },
        "search": {
            "diversity_penalty": 0.0,
            "do_sample": sampling.do_sample,
            "early_stopping": True,
            "length_penalty": 1.0,
            "max_length": spec.context_length,
            "min_length": 0,
            "no_repeat_ngram_size": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": True,
            "repetition_penalty": sampling.repetition_penalty,
            "temperature": sampling.temperature,
            "top_k": 50 if generation.get("top_k") is None else sampling.top_k,
            "top_p": sampling.top_p,
        },
    }
