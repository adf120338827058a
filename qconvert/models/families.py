"""The families that can be exported: one row each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qconvert.models.family import Family
from qconvert.models.llama import LLAMA
from qconvert.models.qwen2 import QWEN2
from qconvert.models.qwen3 import QWEN3
from qconvert.models.spec import DecoderSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FAMILIES: dict[str, Family] = {family.model_type: family for family in (QWEN2, QWEN3, LLAMA)}
SUPPORTED = "; ".join(f"{family.architecture} is supported: {family.models}" for family in FAMILIES.values())

# Relatives that people bring, by the beginning of their model_type, longest first: what sets them apart.
_RELATIVES = (
    (("qwen2_moe", "qwen3_moe", "qwen3_next", "mixtral", "deepseek"), "a mixture of experts"),
    (
        (
            *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen2_audio", "qwen2_5_omni", "qwen3_omni", "mllama"),
            *("llama4", "gemma3", "mistral3", "llava"),
        ),
        "a model that reads more than text",
    ),
    (("qwen3_5",), "the family Qwen3.5, whose layers attend linearly"),
    (("mistral", "ministral"), "the family Mistral"),
    (("gemma", "phi", "smollm3", "olmo", "granite", "cohere"), "another family"),
    (("qwen",), "another family of Qwen"),
)


def what_it_is(model_type: object) -> str:
    """A few words on a model that is none of our families, for the message that refuses it."""
    name = model_type if isinstance(model_type, str) else ""
    return next((what for names, what in _RELATIVES if name.startswith(names)), "another architecture")


def find_family(model_type: object, architectures: Sequence[object] | None) -> Family | None:
    """The family of a config.json, by what it says of itself; None if it is none of ours."""
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None or (architectures and family.architecture not in architectures):
        return None
    return family


def family_of(config: Any) -> Family:
    """The family of a configuration that ``checkpoint/config.py`` has loaded."""
    return FAMILIES[config.model_type]


def spec_of(config: Any) -> DecoderSpec:
    """The decoder that such a configuration stands for."""
    return family_of(config).spec(config)


def rope_tables(config: Any, length: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines of the rotary embedding, from transformers' own rope functions.

    Returns:
        Two float32 arrays ``[length, head_size / 2]``, the scaling of YaRN included.
    """
    import torch

    rotary = family_of(config).transformers_class("RotaryEmbedding")(config)
    with torch.no_grad():
        cos, sin = rotary(torch.zeros(1, dtype=torch.float32), torch.arange(length)[None])
    half = cos.shape[-1] // 2  # transformers repeats each angle for both halves of a head
    return cos[0, :, :half].contiguous().numpy(), sin[0, :, :half].contiguous().numpy()
