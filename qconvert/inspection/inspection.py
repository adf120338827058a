"""What a checkpoint is, whether it is whole, and what running it will cost; no weight is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qconvert.checkpoint.config import load_config, tensor_problems
from qconvert.checkpoint.files import read_json_object, read_weight_files, text_file_states
from qconvert.checkpoint.load import FileState, TensorInfo, checkpoint_name
from qconvert.errors import QconvertError
from qconvert.models.families import spec_of
from qconvert.models.spec import DecoderSpec
from qconvert.recipes.choose import RECIPES, Wishes, choose
from qconvert.recipes.forecast import kv_bytes_per_token, parameter_count
from qconvert.targets import DEFAULT_TARGET, TARGETS, Target

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_KV_DTYPES = {"fp32": "float32", "fp16": "float16", "int8": "int8"}
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


@dataclass(frozen=True)
class Inspection:
    """Everything ``qconvert inspect`` tells.

    ``weight_bytes`` is keyed by precision, with the options that change it, and holds the bytes of an
    export's data files, None where it would be refused; ``kv_bytes_per_token`` is keyed by precision of the
    cache; ``context_length`` is in tokens. ``problems`` is empty for a whole checkpoint.
    """

    name: str
    folder: str
    facts: tuple[Fact, ...]
    parameters: int
    weight_bytes: dict[str, int | None]
    context_length: int
    kv_bytes_per_token: dict[str, int]
    files: tuple[FileState, ...]
    problems: tuple[str, ...]

    @property
    def whole(self) -> bool:
        """Whether every needed file is whole and the tensors fit the configuration."""
        return not self.problems

    @property
    def kv_bytes_full_context(self) -> dict[str, int]:
        return {name: size * self.context_length for name, size in self.kv_bytes_per_token.items()}

    def to_json(self) -> dict[str, Any]:
        """One JSON object; facts are keyed by section and key."""
        sections: dict[str, dict[str, Any]] = {}
        for fact in self.facts:
            entry = {"value": fact.value, "meaning": fact.meaning}
            sections.setdefault(fact.section, {})[fact.key] = entry
        return {
            "name": self.name,
            "folder": self.folder,
            "whole": self.whole,
            "problems": list(self.problems),
            "facts": sections,
            "parameters": self.parameters,
            "weight_bytes": self.weight_bytes,
            "context_length": self.context_length,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "kv_bytes_full_context": self.kv_bytes_full_context,
            "files": [asdict(state) for state in self.files],
        }


def describe(folder: Path) -> Inspection:
    """Inspects a checkpoint whose configuration is readable; its weights may be absent or broken.

    Raises:
        QconvertError: no folder, no or a malformed config.json, or a model that an export does not cover.
    """
    config = load_config(folder)
    spec = spec_of(config)
    weights = read_weight_files(folder)
    files = (*text_file_states(folder), *weights.states)
    problems = [state.problem for state in files if state.harmful]
    if all(state.status == "whole" for state in weights.states):
        problems += tensor_problems(config, weights.tensors)
    return Inspection(
        name=checkpoint_name(folder),
        folder=str(folder),
        facts=tuple(_facts(folder, config, spec, weights.tensors)),
        parameters=parameter_count(spec),
        weight_bytes={name: _weight_bytes(spec, *offer) for name, offer in _offers()},
        context_length=spec.context_length,
        kv_bytes_per_token={name: kv_bytes_per_token(spec, dtype) for name, dtype in _KV_DTYPES.items()},
        files=files,
        problems=tuple(problems),
    )


def _offers() -> Iterator[tuple[str, tuple[Target, Wishes]]]:
    """Exports whose weights are told, and the names under which they are."""
    for target in TARGETS.values():
        prefix = "" if target.name == DEFAULT_TARGET else f"{target.name} "
        for precision in target.capabilities.precisions:
            yield f"{prefix}{precision}", (target, Wishes(precision))
    target = TARGETS[DEFAULT_TARGET]
    for recipe in RECIPES[1:]:
        yield f"int4 --recipe {recipe}", (target, Wishes("int4", recipe=recipe))
    yield "int4 --prefill int8", (target, Wishes("int4", prefill=True))


def _weight_bytes(spec: DecoderSpec, target: Target, wishes: Wishes) -> int | None:
    from qconvert.lowering.forecast import data_bytes

    try:
        spec = target.fit(spec, None)
        choice = choose(wishes, target.capabilities, spec)
    except QconvertError:
        return None
    return sum(data_bytes(target.lower, spec, choice.recipe).values())


def _facts(
    folder: Path, config: PreTrainedConfig, spec: DecoderSpec, tensors: Mapping[str, TensorInfo]
) -> Iterator[Fact]:
    tokenizer = read_json_object(folder / "tokenizer.json")[1] or {}
    names = {token["id"]: token["content"] for token in tokenizer.get("added_tokens", [])}
    yield from _model_facts(config, spec, tensors)
    yield from _attention_facts(config, spec)
    yield from _position_facts(config, spec)
    yield from _token_facts(folder, config, tokenizer, names)
    yield from _generation_facts(read_json_object(folder / "generation_config.json")[1] or {}, names)


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
    folder: Path, config: PreTrainedConfig, tokenizer: Mapping[str, Any], names: Mapping[int, str]
) -> Iterator[Fact]:
    section = "tokens"
    yield Fact(
        section, "vocab_size", config.vocab_size, _vocabulary_meaning(config.vocab_size, tokenizer, names)
    )
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


def _vocabulary_meaning(rows: int, tokenizer: Mapping[str, Any], names: Mapping[int, str]) -> str:
    meaning = "rows of embedding and head"
    vocab = tokenizer.get("model", {}).get("vocab")
    if not isinstance(vocab, dict):
        return meaning
    entries = len({*vocab.values(), *names})
    if entries > rows:
        return f"{meaning}; TOO FEW for the tokenizer's {entries} entries"
    return f"{meaning}; {entries} are in use" + (f", {rows - entries} padding" if entries < rows else "")


def _token_names(value: object, names: Mapping[int, str]) -> str:
    if value is None:
        return "none"
    ids: list[Any] = value if isinstance(value, list) else [value]
    return " ".join(names.get(token, "(no special token)") for token in ids) if names else ""


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
