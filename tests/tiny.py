"""Random checkpoints of every family, some hundred kilobytes, with weights that let no mistake cancel out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 10_000.0,
}
# Of the weights of models with 128 columns and more that are rounded and proven. Twice the usual width asks
# for smaller weights: with the usual ones the model is so sensitive that right rounding to 8 and 4 bits is
# beyond the limits, or within them by chance.
WIDE_RANGE = 0.125
# What a tiny checkpoint of a family has beside the common sizes: whatever sets the family apart.
_FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {"head_dim": 32},  # four heads of 32 are wider than the hidden size of 64
    "llama": {"rope_parameters": LLAMA3},
}
_CONFIG: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
    "bos_token_id": 256,
    "eos_token_id": 258,
    "pad_token_id": 256,
}


def tiny_config() -> dict[str, Any]:
    """The sizes of the tiny checkpoints, as fields of config.json."""
    return dict(_CONFIG)


def make_tiny_checkpoint(
    folder: Path,
    *,
    family: str = "qwen2",
    dtype: str = "float32",
    sharded: bool = False,
    sliding: bool = False,
    yarn: bool = False,
    tokenizer: bool = True,
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Writes a random checkpoint and returns its folder, which is created.

    Weights are large (std ``initializer_range`` = 0.2), biases and norms far from 0 and 1, so that a wrong
    bias, norm, angle or head shows in the logits.

    Args:
        family: its model_type.
        dtype: of the weights on disk: float32, float16 or bfloat16.
        sharded: several weight files with an index.
        sliding: a window of 16 tokens in force on all layers but the first.
        yarn: YaRN scaling by 4 from 64 positions (a context of 256).
        tokenizer: a byte-level tokenizer with ChatML's special tokens.
        overrides: any field of the family's configuration.
    """
    import torch
    from transformers import GenerationConfig

    from qconvert.models.families import FAMILIES

    found = FAMILIES[family]
    settings = {**_CONFIG, **_FAMILIES[family]}
    if sliding:
        settings |= {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
    if yarn:
        settings |= {"rope_parameters": {**YARN, "rope_theta": 10_000.0}, "max_position_embeddings": 64}
    config = found.transformers_class("Config")(**{**settings, **overrides})

    generator = torch.Generator().manual_seed(seed)
    model = found.transformers_class("ForCausalLM")(config)
    std = config.initializer_range
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else std * noise)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=[config.eos_token_id, config.bos_token_id],
        pad_token_id=config.pad_token_id,
        do_sample=True,
        temperature=0.7,
        top_k=20,
        top_p=0.8,
        repetition_penalty=1.05,
    )
    folder.mkdir(parents=True, exist_ok=True)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size="100KB" if sharded else "5GB")
    if tokenizer:
        write_tiny_tokenizer(folder)
    return folder


def write_tiny_tokenizer(folder: Path) -> None:
    """Bytes 0..255, then <|endoftext|> 256, <|im_start|> 257, <|im_end|> 258: every text has token ids."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in specials])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 256,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
