"""What ``qconvert inspect`` tells of a checkpoint, one field after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qconvert.checkpoint.file_state import FileState
from qconvert.checkpoint.files import TensorInfo
from qconvert.checkpoint.text_files import BESIDE_TOKENIZER, read_json_object
from qconvert.checkpoint.tokenizer import read_tokenizer
from qconvert.checkpoint.tokens import end_tokens
from qconvert.models.families import family_of
from qconvert.models.spec import DecoderSpec

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedConfig

_GENERATION_MEANINGS = {
    "do_sample": "false: the likeliest token; true: draw",
    "temperature": "below 1 sharper, above 1 flatter",
    "top_k": "draw among this many likeliest",
    "top_p": "draw among the likeliest of this sum",
    "min_p": "at least this share of the likeliest",
    "repetition_penalty": "above 1: seen tokens less likely",
    "max_new_tokens": "length of an answer at most",
    "max_length": "length of prompt and answer at most",
}
_TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Fact:
    """One field with its value (JSON-ready) and what it means for inference."""

    section: str
    key: str
    value: Any
    meaning: str


def find_facts(
    folder: Path,
    config: PreTrainedConfig,
    spec: DecoderSpec,
    tensors: Mapping[str, TensorInfo],
    states: Sequence[FileState],
) -> Iterator[Fact]:
    """All that files in a usable state say."""
    broken = {state.name for state in states if state.harmful}
    usable = broken.isdisjoint(("tokenizer.json", *BESIDE_TOKENIZER))
    tokenizer = read_tokenizer(folder) if usable else None
    added = {} if tokenizer is None else tokenizer.get_added_tokens_decoder()
    names = {token_id: token.content for token_id, token in added.items()}
    generation = read_json_object(folder / "generation_config.json")[1] or {}
    yield from _model_facts(config, spec, tensors)
    yield from _attention_facts(config, spec)
    yield from _position_facts(config, spec)
    yield from _token_facts(folder, config, tokenizer, names)
    if not broken:
        yield from _end_facts(folder, config, generation, names)
    yield from _generation_facts(generation, names)


def _end_facts(
    folder: Path, config: PreTrainedConfig, generation: Mapping[str, Any], names: Mapping[int, str]
) -> Iterator[Fact]:
    ends = end_tokens(folder, config, generation, config.vocab_size)
    files = sorted({file for found in ends.sources.values() for file in found})
    meaning = f"{_token_names(ends.ids, names)} (named by {', '.join(files)})" if files else "nothing ends it"
    yield Fact("tokens", "an answer ends at", ends.ids or None, "; ".join([meaning, *ends.notes]))


def _model_facts(
    config: PreTrainedConfig, spec: DecoderSpec, tensors: Mapping[str, TensorInfo]
) -> Iterator[Fact]:
    section = "model"
    architectures = ", ".join(config.architectures or ["(not stated)"])
    yield Fact(section, "architectures", architectures, f"model_type {config.model_type}")
    yield Fact(section, "num_hidden_layers", spec.num_hidden_layers, "blocks")
    yield Fact(section, "hidden_size", spec.hidden_size, "width of the residual stream")
    yield Fact(
        section, "intermediate_size", spec.intermediate_size, f"width of the gated MLP ({config.hidden_act})"
    )
    tied = "head and embedding are one tensor" if spec.tie_word_embeddings else "the head is its own tensor"
    yield Fact(section, "tie_word_embeddings", spec.tie_word_embeddings, tied)
    yield Fact(section, "rms_norm_eps", spec.rms_norm_eps, "added to the variance in every norm")
    dtype = None if config.dtype is None else str(config.dtype).removeprefix("torch.")
    yield Fact(section, "dtype", dtype, _dtype_meaning(dtype))
    stored = sorted({info.dtype for info in tensors.values()})
    yield Fact(section, "dtype on disk", ", ".join(stored) or None, "what the weight files hold")


def _dtype_meaning(dtype: str | None) -> str:
    return {
        "bfloat16": "8 exponent bits, 7 mantissa bits: fp16 has a smaller range and can overflow here",
        "float16": "5 exponent bits, 10 mantissa bits: largest value 65504",
        "float32": "full precision",
        None: "not stated: the weight files decide",
    }.get(dtype, "")


def _attention_facts(config: PreTrainedConfig, spec: DecoderSpec) -> Iterator[Fact]:
    section = "attention"
    heads, kv_heads = spec.num_attention_heads, spec.num_key_value_heads
    yield Fact(section, "num_attention_heads", heads, "query heads")
    group = heads // kv_heads
    shared = f"{group} queries share one: a cache {group}x smaller" if group > 1 else "one for each query"
    yield Fact(section, "num_key_value_heads", kv_heads, shared)
    origin = "head_dim" if getattr(config, "head_dim", None) else "hidden_size / heads"
    yield Fact(section, "head size", spec.head_size, f"from {origin}; {_extras(spec)}")
    sliding = [layer for layer, window in enumerate(spec.sliding_windows) if window is not None]
    if not family_of(config).windows:
        return
    yield Fact(
        section, "use_sliding_window", bool(config.use_sliding_window), _sliding_meaning(spec, sliding)
    )
    if sliding:
        window = config.sliding_window
        yield Fact(section, "sliding_window", window, f"tokens seen by a query, layers {_ranges(sliding)}")


def _extras(spec: DecoderSpec) -> str:
    """What families have or lack beside the projections."""
    biases = "q, k, v have biases" if spec.qkv_bias else "no biases"
    return f"{biases}, heads of q and k are normed" if spec.qk_norm else biases


def _sliding_meaning(spec: DecoderSpec, sliding: list[int]) -> str:
    if not sliding:
        return "not in force: layers see all tokens"
    return f"in force on {len(sliding)} of {spec.num_hidden_layers} layers"


def _ranges(numbers: list[int]) -> str:
    """``[1, 2, 3, 7]`` as ``1-3, 7``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _position_facts(config: PreTrainedConfig, spec: DecoderSpec) -> Iterator[Fact]:
    section = "positions"
    rope = config.rope_parameters
    kind = rope["rope_type"]
    yield Fact(section, "rope_theta", rope["rope_theta"], "base of the rotary positions")
    original = rope.get("original_max_position_embeddings")
    meanings = {
        "default": "no scaling",
        "linear": f"positions divided by {rope.get('factor')}",
        "llama3": f"low frequencies divided by {rope.get('factor')}",
        "yarn": f"context stretched by {rope.get('factor')} from {original}",
    }
    yield Fact(section, "rope_type", kind, meanings[kind])
    positions = config.max_position_embeddings
    yield Fact(section, "max_position_embeddings", positions, "positions in training")
    reason = "YaRN's stretch included" if kind == "yarn" else "prompt and answer together"
    yield Fact(section, "context limit", spec.context_length, f"tokens; {reason}")


def _token_facts(
    folder: Path, config: PreTrainedConfig, tokenizer: Tokenizer | None, names: Mapping[int, str]
) -> Iterator[Fact]:
    section = "tokens"
    yield Fact(section, "vocab_size", config.vocab_size, _vocabulary_meaning(config.vocab_size, tokenizer))
    for key in _TOKEN_KEYS:
        value = getattr(config, key)
        yield Fact(section, key, value, _token_names(value, names))
    settings = read_json_object(folder / "tokenizer_config.json")[1] or {}
    if (folder / "chat_template.jinja").is_file():
        template = "chat_template.jinja"
    elif settings.get("chat_template"):
        template = "in tokenizer_config.json"
    else:
        yield Fact(section, "chat template", False, "a base model: give it plain text")
        return
    yield Fact(section, "chat template", True, template)


def _vocabulary_meaning(rows: int, tokenizer: Tokenizer | None) -> str:
    meaning = "rows of embedding and head"
    if tokenizer is None:
        return meaning
    entries = len(set(tokenizer.get_vocab(with_added_tokens=True).values()))
    if entries > rows:
        return f"{meaning}; TOO FEW for the tokenizer's {entries} entries"
    return f"{meaning}; {entries} are in use" + (f", {rows - entries} padding" if entries < rows else "")


def _token_names(value: object, names: Mapping[int, str]) -> str:
    if value is None:
        return "none"
    ids: list[Any] = value if isinstance(value, list) else [value]
    known = (names.get(token) if isinstance(token, int) else None for token in ids)
    return " ".join(name or "(no special token)" for name in known) if names else ""


def _generation_facts(generation: Mapping[str, Any], names: Mapping[int, str]) -> Iterator[Fact]:
    section = "generation defaults"
    if not generation:
        yield Fact(section, "generation_config", None, "none: greedy unless a request says otherwise")
    for key, value in generation.items():
        if key in _TOKEN_KEYS:
            both = ", with config.json's" if key == "eos_token_id" else ""
            yield Fact(section, key, value, _token_names(value, names) + both)
        elif key not in ("transformers_version", "_from_model_config"):
            yield Fact(section, key, value, _GENERATION_MEANINGS.get(key, ""))
