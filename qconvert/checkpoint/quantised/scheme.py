"""How a checkpoint's weights are quantised, as it says itself; and its matrices, found by their names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from qconvert.checkpoint.computed import Computed
from qconvert.checkpoint.files import TensorInfo, read_weight_files
from qconvert.checkpoint.fit import holds_plain_floats
from qconvert.checkpoint.quantised.awq import read_awq
from qconvert.checkpoint.quantised.compressed import read_compressed
from qconvert.checkpoint.quantised.fields import ORIGINAL, Field
from qconvert.checkpoint.quantised.floats8 import read_float8
from qconvert.checkpoint.quantised.gptq import read_gptq
from qconvert.checkpoint.quantised.tensors import TensorFiles
from qconvert.checkpoint.text_files import read_json_object
from qconvert.errors import QconvertError

# Where AutoGPTQ and AutoAWQ wrote it before config.json had a place for it, and whose file it is.
OLD_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
QUANTISATION_KEYS = ("quantization_config", "compression_config")  # of config.json; the second is older
_OF_MODELOPT = "hf_quant_config.json"  # NVIDIA's Model Optimizer; config.json says nothing of it
_HEAD = "lm_head"
_DEQUANTISED = (
    ". The weight files hold plain floats: if this model was dequantised, delete quantization_config from "
    "config.json"
)


class Scheme(Protocol):
    """One way to quantise, with what a checkpoint says of it.

    Attributes:
        name: its ``quant_method``.
        fields: what was read, for people.
    """

    @property
    def name(self) -> str: ...

    @property
    def fields(self) -> tuple[Field, ...]: ...

    def owns(self, base: str, files: TensorFiles) -> tuple[str, ...]:
        """The tensors of a quantised matrix, by its name without ``.weight``; none where it is in floats."""
        ...

    def matrix(self, base: str, shape: tuple[int, int], files: TensorFiles) -> Computed:
        """A matrix by its name without ``.weight``.

        Raises:
            QconvertError: its tensors are not what they should be.
        """
        ...


@dataclass(frozen=True)
class Quantised:
    """A checkpoint's tensors, told apart.

    Attributes:
        scheme: how they are quantised.
        computed: the quantised ones, by the names that they have as floats.
        tensors: all others.
    """

    scheme: Scheme
    computed: dict[str, Computed]
    tensors: dict[str, TensorInfo]

    @property
    def all(self) -> dict[str, TensorInfo]:
        """Every tensor as if it were a float, to be held against the configuration."""
        return self.tensors | {
            name: TensorInfo("F32", tensor.shape, "") for name, tensor in self.computed.items()
        }


_READERS: dict[str, Callable[[Mapping[str, Any], str], Scheme]] = {
    "gptq": read_gptq,
    "awq": read_awq,
    "compressed-tensors": read_compressed,
    "fp8": read_float8,
    "fbgemm_fp8": read_float8,
}
SUPPORTED_METHODS = "GPTQ, AWQ, compressed-tensors and FP8"
# What compressed-tensors keeps for a KV cache in floats of 8 bits, which nothing here has.
_OF_KV_CACHE = re.compile(r"\.self_attn\.[qkv]_scale$")


def find_scheme(folder: Path) -> Scheme | None:
    """What a checkpoint says of its quantisation; None where its weights are floats.

    Raises:
        QconvertError: a method or a field that is not covered.
    """
    config = read_json_object(folder / "config.json")[1] or {}
    raw = next((found for key in QUANTISATION_KEYS if (found := config.get(key))), None)
    where = f"{folder / 'config.json'}, quantization_config"
    if not raw and (old := next((name for name in OLD_FILES if (folder / name).is_file()), None)) is not None:
        state, raw = read_json_object(folder / old)
        where = str(folder / old)
        if raw is None:
            raise QconvertError(f"{state.problem}.", where=where, hint=state.hint or None)
        raw = {"quant_method": OLD_FILES[old], **raw}
    if not raw and (folder / _OF_MODELOPT).is_file():
        told = (read_json_object(folder / _OF_MODELOPT)[1] or {}).get("quantization")
        kind = told.get("quant_algo") if isinstance(told, dict) else None
        if kind is not None:
            raise _refusal(folder, f"modelopt ({kind})", str(folder / _OF_MODELOPT))
    if not raw:
        return None
    named = raw.get("quant_method") if isinstance(raw, dict) else raw
    reader = _READERS.get(named.lower()) if isinstance(named, str) else None
    if reader is None or holds_plain_floats(read_weight_files(folder).tensors):
        raise _refusal(folder, named, where)
    return reader(raw, where)


def find_quantised(
    folder: Path, scheme: Scheme, tensors: Mapping[str, TensorInfo], expected: Mapping[str, tuple[int, ...]]
) -> Quantised:
    """A checkpoint's quantised matrices.

    Args:
        folder: the checkpoint's.
        scheme: what it says of itself.
        tensors: what its files hold.
        expected: the model's tensors with their shapes.

    Raises:
        QconvertError: tensors that are not what they should be.
    """
    files, left = TensorFiles(folder, tensors), dict(tensors)
    computed: dict[str, Computed] = {}
    for name, shape in expected.items():
        base = name.removesuffix(".weight")
        owned = scheme.owns(base, files)
        if len(shape) != 2 or not owned:
            continue
        computed[name] = scheme.matrix(base, (shape[0], shape[1]), files)
        for each in owned:
            del left[each]
        _drop_bias_of_zeros(base, files, left, expected)
    for name in [name for name in left if _OF_KV_CACHE.search(name)]:
        del left[name]
    if f"{_HEAD}.weight" not in computed and scheme.owns(_HEAD, files):
        raise QconvertError(
            "lm_head is quantised by itself, although the config ties it to the embedding.",
            where=folder / "config.json",
            hint="set tie_word_embeddings to false if the head is its own",
        )
    return Quantised(scheme, computed, left)


def _drop_bias_of_zeros(
    base: str, files: TensorFiles, left: dict[str, TensorInfo], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """AutoGPTQ gives every matrix a bias; where the model has none it has to be zeros."""
    name = f"{base}.bias"
    if name in expected or name not in left:
        return
    if bool(files.read(name).any()):
        raise QconvertError(
            f"{name} has no place in this model, and is not all zeros.", where=files.folder, hint=ORIGINAL
        )
    del left[name]


def _refusal(folder: Path, named: object, where: str) -> QconvertError:
    method = "unnamed" if named is None else named
    plain = holds_plain_floats(read_weight_files(folder).tensors)
    known = isinstance(named, str) and named.lower() in _READERS
    return QconvertError(
        f"This checkpoint is quantised already, with method {method}."
        + ("" if known else f" Of such checkpoints, {SUPPORTED_METHODS} are read."),
        where=where,
        hint=ORIGINAL + (_DEQUANTISED if plain else ""),
    )
