"""A GGUF file's metadata as config.json and generation_config.json. What is not understood is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from qconvert.errors import QconvertError
from qconvert.models.families import FAMILIES, SUPPORTED, what_it_is

ROPE_FACTORS = "rope_freqs.weight"
# Llama 3.1 and later: how far wavelengths are stretched, for every file that has such factors.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# Keys behind the architecture's name that change nothing here, and those with the only value that is covered.
_HARMLESS = frozenset({"vocab_size", "tensor_data_layout", "rope.scaling.finetuned"})
_ONLY = {
    "attention.causal": True,
    "expert_count": 0,
    "expert_used_count": 0,
    "rope.scale_linear": 1.0,
    "rope.scaling.attn_factor": 1.0,
    "attention.sliding_window": 0,
    "use_parallel_residual": False,
}


@dataclass
class Fields:
    """The entries of one file, each of a type that is asked for."""

    path: Path
    entries: Mapping[str, Any]

    def number(self, key: str, kind: type = int) -> Any:
        """A number, or None where there is none; arrays of one number for all layers are that number.

        Raises:
            QconvertError: it is of another type.
        """
        value = self.entries.get(key)
        if isinstance(value, np.ndarray) and value.size and bool((value == value[0]).all()):
            value = value[0].item()
        if value is None:
            return None
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
            self.refuse(key, value, f"{'a number' if kind is float else 'one whole number'} is needed")
        return value

    def needed(self, key: str, kind: type = int) -> Any:
        """The same, where there must be one."""
        value = self.number(key, kind)
        if value is None:
            raise QconvertError(f"{self.path.name} has no {key}.", where=self.path, hint="convert it again")
        return value

    def text(self, key: str) -> str | None:
        """A string, or None where there is none."""
        value = self.entries.get(key)
        if value is None:
            return None
        try:
            return (
                bytes(value).decode("utf-8")
                if isinstance(value, bytes)
                else self.refuse(key, value, "text is needed")
            )
        except UnicodeDecodeError:
            self.refuse(key, value, "text in UTF-8 is needed")

    def refuse(self, key: str, value: object, why: str) -> NoReturn:
        """Raise what is wrong with an entry."""
        shown = f"{value!r:.60}"
        raise QconvertError(f"{key} = {shown} is not supported: {why}.", where=self.path, hint=SUPPORTED)


def architecture(fields: Fields) -> str:
    """The family's name.

    Raises:
        QconvertError: it is none of ours.
    """
    if fields.text("general.type") not in (None, "model"):
        fields.refuse("general.type", fields.text("general.type"), "a whole model is needed")
    found = fields.text("general.architecture")
    if found not in FAMILIES:
        what = what_it_is((found or "").replace("moe", "_moe").replace("vl", "_vl").replace("__", "_"))
        raise QconvertError(
            f"This GGUF file is {what}: general.architecture {found}.", where=fields.path, hint=SUPPORTED
        )
    return found


def config_of(
    fields: Fields, *, vocab_size: int, tied: bool, rope_factors: NDArray[np.float32] | None
) -> dict[str, Any]:
    """What config.json says of such a model, as far as an export needs it.

    Args:
        fields: the file's.
        vocab_size: rows of the embedding.
        tied: there is no head of its own.
        rope_factors: Llama 3's, ``[head_size / 2]``.

    Raises:
        QconvertError: an entry is missing, of a wrong type, or not understood.
    """
    family = FAMILIES[architecture(fields)]
    arch = family.model_type
    heads = fields.needed(f"{arch}.attention.head_count")
    hidden = fields.needed(f"{arch}.embedding_length")
    head = fields.number(f"{arch}.attention.key_length") or (hidden // heads if heads > 0 else 0)
    for key in ("attention.value_length", "rope.dimension_count"):
        if fields.number(f"{arch}.{key}") not in (None, head):
            fields.refuse(f"{arch}.{key}", fields.number(f"{arch}.{key}"), f"a head has {head} numbers")
    context = fields.needed(f"{arch}.context_length")
    rope = _rope(fields, arch, context, rope_factors)
    _check_all(fields, arch)
    kv_heads = fields.number(f"{arch}.attention.head_count_kv")
    found = {
        "architectures": [family.architecture],
        "model_type": arch,
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": fields.needed(f"{arch}.feed_forward_length"),
        "num_hidden_layers": fields.needed(f"{arch}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": heads if kv_heads is None else kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": context,
        # A 32-bit number: 1e-06 and not 9.999999974752427e-07.
        "rms_norm_eps": float(f"{fields.needed(f'{arch}.attention.layer_norm_rms_epsilon', float):.7g}"),
        "rope_parameters": rope,
        "tie_word_embeddings": tied,
        "use_cache": True,
    }
    for name, key in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        found[name] = fields.number(f"tokenizer.ggml.{key}_token_id")
    return found | ({"head_dim": head} if family.qk_norm or head * heads != hidden else {})


def _rope(fields: Fields, arch: str, context: int, factors: NDArray[np.float32] | None) -> dict[str, Any]:
    theta = fields.number(f"{arch}.rope.freq_base", float)
    theta = 10_000.0 if theta is None else float(f"{theta:.7g}")
    kind = fields.text(f"{arch}.rope.scaling.type") or "none"
    factor = fields.number(f"{arch}.rope.scaling.factor", float)
    original = fields.number(f"{arch}.rope.scaling.original_context_length")
    if factors is not None:
        return _llama3(fields, theta, factors)
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if kind not in ("linear", "yarn") or factor is None:
        fields.refuse(f"{arch}.rope.scaling.type", kind, "none, linear and yarn are, with a factor")
    found = {"rope_type": kind, "rope_theta": theta, "factor": factor}
    return found | ({"original_max_position_embeddings": original or context} if kind == "yarn" else {})


def _llama3(fields: Fields, theta: float, factors: NDArray[np.float32]) -> dict[str, Any]:
    """The parameters that give these factors; there are no others in the files that llama.cpp writes."""
    factor = float(factors.max())
    found = {"rope_type": "llama3", "rope_theta": theta, "factor": factor, **_LLAMA3}
    if not theta > 0:
        fields.refuse("rope.freq_base", theta, "a positive number is needed")
    inverse = theta ** -(np.arange(len(factors), dtype=np.float64) / len(factors))
    wavelength = 2 * math.pi / inverse
    low = _LLAMA3["original_max_position_embeddings"] / _LLAMA3["low_freq_factor"]
    high = _LLAMA3["original_max_position_embeddings"] / _LLAMA3["high_freq_factor"]
    smooth = (low / wavelength - 1) / (_LLAMA3["high_freq_factor"] / _LLAMA3["low_freq_factor"] - 1)
    between = 1 / ((1 - smooth) / factor + smooth)
    due = np.where(wavelength < high, 1.0, np.where(wavelength > low, factor, between))
    if not np.allclose(factors, due, rtol=1e-4):
        fields.refuse(ROPE_FACTORS, factors[:3].tolist(), "its factors are not those of Llama 3")
    return found


def _check_all(fields: Fields, arch: str) -> None:
    """Refuse what could change the model's function and is not read."""
    read = {
        *("block_count", "context_length", "embedding_length", "feed_forward_length"),
        *("attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon"),
        *("attention.key_length", "attention.value_length", "rope.dimension_count", "rope.freq_base"),
        *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length"),
    }
    for key, value in fields.entries.items():
        name = key.removeprefix(f"{arch}.")
        if name == key or name in read or name in _HARMLESS:
            continue
        if name not in _ONLY or isinstance(value, np.ndarray) or value != _ONLY[name]:
            fields.refuse(
                key, value, "it is not known what it means" if name not in _ONLY else f"{_ONLY[name]} is"
            )
