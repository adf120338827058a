"""Whether the tensors of the weight files are those of the configuration; if not, why, and what to do."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qconvert.checkpoint.file_state import MERGE
from qconvert.checkpoint.files import TensorInfo
from qconvert.models.families import family_of, spec_of
from qconvert.models.recorder import expected_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FLOAT_DTYPES = ("F32", "F16", "BF16", "F64")
AGAIN = "download the whole checkpoint again"
_RENAME = (
    "rename the tensors (in an index, too); in Python: t = safetensors.torch.load_file(FILE); "
    "safetensors.torch.save_file({{k.replace({old!r}, ''): v for k, v in t.items()}}, FILE, "
    "{{'format': 'pt'}})"
)
_BY_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
# What programs put into the names of tensors: who, and how the model inside is reached there.
_WRAPPERS = {
    "_orig_mod": ("torch.compile", "model._orig_mod"),
    "module": ("DistributedDataParallel", "model.module"),
    "_fsdp_wrapped_module": ("FullyShardedDataParallel", "the model with its full state dict"),
    "_checkpoint_wrapped_module": ("activation checkpointing", "the model before it is wrapped"),
    "_forward_module": ("Lightning Fabric", "model.module"),
    "base_model": ("peft", "model.merge_and_unload()"),
}
# Ends of tensors' names in the formats that others store quantised weights in.
_QUANTISED = re.compile(
    r"\.(qweight|qzeros|g_idx|scales|absmax|quant_map|nested_absmax|SCB|weight_(scale|scale_inv|packed|shape)"
    r"|(input|k|v)_scale)$|\.quant_state\."
)


@dataclass(frozen=True)
class Misfit:
    """What the weight files lack, misshape or have too much, one sentence each; and what to do."""

    problems: tuple[str, ...]
    hint: str


def find_misfit(config: PreTrainedConfig, tensors: Mapping[str, TensorInfo]) -> Misfit | None:
    """None where the tensors fit the configuration."""
    expected = expected_tensors(spec_of(config))
    if named := _other_names(tensors, expected):
        return named
    allowed_extra = {"lm_head.weight"} if config.tie_word_embeddings else set()
    problems, missing = [], []
    for name, shape in expected.items():
        if name not in tensors:
            untied = name == "lm_head.weight"
            missing.append(name)
            problems.append(f"{name} is missing" + (" (tie_word_embeddings is false)" if untied else ""))
        elif tensors[name].shape != shape:
            problems.append(f"{name} has shape {list(tensors[name].shape)}, the config implies {list(shape)}")
        elif tensors[name].dtype not in FLOAT_DTYPES and not _is_gguf(tensors[name]):
            problems.append(
                f"{name} is stored as {tensors[name].dtype}, not as one of {', '.join(FLOAT_DTYPES)}"
            )
    for name in tensors:
        harmless = name in allowed_extra or name.endswith(".rotary_emb.inv_freq")
        if name not in expected and not harmless:
            problems.append(f"{name} has no place in {family_of(config).architecture}")
    if not problems:
        return None
    return Misfit(tuple(problems), _remedy(config, tensors, missing, problems))


def holds_plain_floats(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether nothing in the files looks like quantised weights."""
    floats = all(info.dtype in FLOAT_DTYPES for info in tensors.values())
    return bool(tensors) and floats and not any(map(_QUANTISED.search, tensors))


def _is_gguf(info: TensorInfo) -> bool:
    """Whether a tensor has a type of GGUF files, whose matrices are dequantised when they are read."""
    if not info.file.endswith(".gguf"):
        return False
    from qconvert.checkpoint.gguf.container import WEIGHT_TYPES

    return info.dtype in WEIGHT_TYPES


def _other_names(tensors: Mapping[str, TensorInfo], expected: Mapping[str, tuple[int, ...]]) -> Misfit | None:
    """Whether all tensors may be there under other names: one message instead of one for each of them."""
    if set(expected) <= set(tensors):
        return None
    if any(".lora_" in name or name.startswith("lora_") for name in tensors):
        return Misfit(("the weight files hold an adapter (LoRA) and not a model",), MERGE)
    wrapped = next((name for name in tensors if name != _unwrapped(name) in expected), None)
    if wrapped is not None:
        piece = "base_model.model." if "base_model.model." in wrapped else f"{_wrapper(wrapped)}."
        who, model = _WRAPPERS[_wrapper(wrapped)]
        found = f'names of tensors have "{piece}" in them, which {who} puts there ({wrapped})'
        remedy = f"save {model} with save_pretrained, or {_RENAME.format(old=piece)}"
        return Misfit((found,), remedy)
    embedding = "model.embed_tokens.weight"
    bare = embedding.removeprefix("model.")
    if bare in tensors:
        found = f'names of tensors lack "model." in front ({bare}): the decoder was saved without its head'
        remedy = "save it with AutoModelForCausalLM in place of AutoModel, or get the original checkpoint"
        return Misfit((found,), remedy)
    longer = next((name for name in tensors if name.endswith(f".{embedding}")), None)
    if longer is not None:
        prefix = longer.removesuffix(embedding)
        found = f'names of tensors begin with "{prefix}": the decoder is a part of a larger model ({longer})'
        return Misfit((found,), f"if nothing else is needed of it, {_RENAME.format(old=prefix)}")
    return None


def _wrapper(name: str) -> str:
    return next(part for part in name.split(".") if part in _WRAPPERS)


def _unwrapped(name: str) -> str:
    """A tensor's name without what wrappers put into it; peft has a "model." of its own after its name."""
    name = re.sub(r"\bbase_model\.model\.(?=model\.|lm_head\.)", "", name)
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _remedy(
    config: PreTrainedConfig, tensors: Mapping[str, TensorInfo], missing: list[str], problems: list[str]
) -> str:
    if any(map(_QUANTISED.search, tensors)) or any("is stored as" in problem for problem in problems):
        return (
            "the weights seem to be quantised already, and nothing here says how (quantization_config in "
            "config.json): download the whole checkpoint again, or give the original checkpoint"
        )
    if missing == ["lm_head.weight"] and len(problems) == 1:
        return (
            "if the head is the embedding, as in the model that this one was trained from, set "
            f"tie_word_embeddings to true in config.json; if not, {AGAIN}"
        )
    embedding = tensors.get("model.embed_tokens.weight")
    rows = embedding.shape[0] if embedding is not None and embedding.shape else 0
    by_rows = [f"{name} has shape [{rows}, {config.hidden_size}]" for name in _BY_VOCABULARY]
    if rows and all(problem.startswith(tuple(by_rows)) for problem in problems):
        return f"if tokens were added in training, set vocab_size to {rows} in config.json; if not, {AGAIN}"
    return f"{AGAIN}; adapters (LoRA) must be merged into the model first"
