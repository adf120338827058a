"""A GGUF file's tensors by their names in the checkpoint, each computed when it is asked for.

What a graph is proven against is dequantised by the ``gguf`` package; ``blocks.py`` repacks codes without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import GGMLQuantizationType, quants
from numpy.typing import NDArray

from qconvert.checkpoint.computed import Computed
from qconvert.checkpoint.gguf.blocks import EXACT, codes_of, keep
from qconvert.checkpoint.gguf.container import Container, open_container
from qconvert.checkpoint.gguf.metadata import ROPE_FACTORS
from qconvert.errors import QconvertError
from qconvert.formats.blocks import assemble
from qconvert.formats.layout import NonFiniteWeightError, PackedWeight, is_finite
from qconvert.formats.recipe import Kept
from qconvert.formats.stored import VOCABULARY

if TYPE_CHECKING:
    import torch

FLOATS = {
    GGMLQuantizationType.F32: "float32",
    GGMLQuantizationType.F16: "float16",
    GGMLQuantizationType.BF16: "bfloat16",
}
# Dequantised values that are computed at a time.
_PIECE = 1 << 21
_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INNER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def checkpoint_name(name: str) -> str:
    """A tensor's name in the checkpoint; an unknown one stays as it is."""
    parts = name.split(".")
    if name in _OUTER:
        return _OUTER[name]
    if len(parts) == 4 and parts[0] == "blk" and parts[1].isdecimal() and parts[2] in _INNER:
        return f"model.layers.{int(parts[1])}.{_INNER[parts[2]]}.{parts[3]}"
    return name


class GgufTensor:
    """One tensor; see ``computed.Computed``.

    Args:
        file: where it is.
        name: in the file.
        order: which of the file's rows each row of the checkpoint is, int64 ``[N]``; None: as they come.
    """

    def __init__(self, file: Container, name: str, order: NDArray[np.int64] | None = None) -> None:
        self._file, self._name, self._order = file, name, order
        found = file.tensors[name]
        self.kind, self.shape = found.kind, found.shape
        self.stored_bytes = found.size
        self._kept: Kept | None = None
        self._looked = False
        self.exact = True  # ``read_tensors`` decides

    @property
    def stored_as(self) -> str:
        """For people."""
        return FLOATS.get(self.kind) or f"{self.kind.name} (GGUF)"

    @property
    def kept(self) -> Kept | None:
        """See ``computed.Computed``; ``exact`` is false where other matrices of the file have no place."""
        if not self._looked:
            self._kept = keep(self.kind, self._bytes(slice(None))) if self.kind in EXACT else None
            self._looked = True
        return self._kept if self.exact else None

    def rows(self, wanted: slice | torch.Tensor) -> torch.Tensor:
        """Some rows in float32."""
        import torch

        picked = np.arange(self.shape[0])[wanted if isinstance(wanted, slice) else wanted.numpy()]
        if len(self.shape) == 1:
            return torch.from_numpy(self._dequantise(self._bytes(slice(None))).reshape(-1)[picked].copy())
        found = torch.empty(len(picked), self.shape[1])
        step = max(1, _PIECE // self.shape[1])
        for start in range(0, len(picked), step):
            part = picked[start : start + step]
            found[start : start + step] = torch.from_numpy(self._dequantise(self._bytes(part)))
        return found

    def pack(self) -> PackedWeight:
        """The codes in blocks of 32.

        Raises:
            NonFiniteWeightError: a scale or a smallest value is NaN or Inf.
        """
        assert self.kept is not None, "no block can hold these codes"
        fmt, parts = self.kept.fmt, []
        step = max(1, _PIECE // self.shape[1])
        for start in range(0, self.shape[0], step):
            found = codes_of(self.kind, self._bytes(np.arange(start, min(start + step, self.shape[0]))))
            if not all(is_finite(each) for each in (found.scales, found.residuals) if each is not None):
                raise NonFiniteWeightError
            packed = assemble(found.codes, found.scales, found.zeros, fmt)
            parts.append(replace(packed, residuals=found.residuals if fmt.residuals else None))
        return _one_below_the_other(parts)

    def order(self) -> None:
        """Inputs come as they are."""

    def release(self) -> None:
        """See ``computed.Computed``."""
        self._file.release(self._name)

    def _bytes(self, rows: slice | NDArray[np.int64]) -> NDArray[np.uint8]:
        content = self._file.rows(self._name)
        if len(self.shape) > 1 and self._order is not None:
            rows = self._order[rows]
        return content[rows]

    def _dequantise(self, content: NDArray[np.uint8]) -> NDArray[np.float32]:
        with np.errstate(all="ignore"):  # NaN and Inf are found by whoever looks at the values
            return np.asarray(quants.dequantize(np.ascontiguousarray(content), self.kind), dtype=np.float32)


@dataclass(frozen=True)
class GgufTensors:
    """All tensors of a model, and what a user may not expect of them."""

    computed: dict[str, Computed]
    notes: tuple[str, ...]


def read_tensors(parts: Sequence[Path], config: Mapping[str, Any]) -> GgufTensors:
    """The tensors of a model.

    Codes are kept if those of all matrices of the decoder can be: a matrix that has no place would have to be
    stored as floats, or rounded beside others that are not.

    Args:
        parts: the files.
        config: config.json of the model.

    Raises:
        QconvertError: a tensor that stands in two parts, or of a type or shape that is not read.
    """
    found: dict[str, GgufTensor] = {}
    for file in map(open_container, parts):
        for name, stored in file.tensors.items():
            called = checkpoint_name(name)
            if name == ROPE_FACTORS:
                continue
            if called in found:
                what, hint = "stands in two of the files", "download the files again"
            elif len(stored.shape) > 2 or not _can_dequantise(stored.kind):
                shape = f"{stored.kind.name} {list(stored.shape)}"
                what, hint = f"is {shape}, which is not read", "get another quantisation of the model"
            else:
                found[called] = GgufTensor(file, name, _order(called, stored.shape, config))
                continue
            raise QconvertError(f"{name} {what}.", where=file.path, hint=hint)
    return GgufTensors(dict(found), tuple(_notes(found)))


def _notes(found: Mapping[str, GgufTensor]) -> Iterator[str]:
    """Decide together whether codes are kept, and say so."""
    linear = {name: each for name, each in found.items() if len(each.shape) == 2 and name not in VOCABULARY}
    quantised = {name: each for name, each in linear.items() if each.kind not in FLOATS}
    if not quantised:
        return
    homeless = [each for each in quantised.values() if each.kept is None]
    if not homeless:
        return
    for each in found.values():
        each.exact = False
    kinds = ", ".join(sorted({each.kind.name for each in homeless}))
    yield (
        f"{len(homeless)} of {len(quantised)} quantised matrices ({kinds}) cannot be stored bit for bit: "
        "none of them is"
    )


def _one_below_the_other(parts: Sequence[PackedWeight]) -> PackedWeight:
    """Rows of one matrix."""
    import torch

    joined: dict[str, Any] = {}
    for each in fields(PackedWeight):
        rows = [getattr(part, each.name) for part in parts]
        joined[each.name] = None if rows[0] is None else torch.cat(rows)
    return PackedWeight(**joined)


def _can_dequantise(kind: GGMLQuantizationType) -> bool:
    return kind in FLOATS or kind in quants._type_traits


def _order(name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> NDArray[np.int64] | None:
    """llama.cpp's Llama rotates neighbours, so its files have the rows of q and k in that order."""
    if config["model_type"] != "llama" or not name.endswith(("q_proj.weight", "k_proj.weight")):
        return None
    heads = config["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
    if heads < 1 or shape[0] % (2 * heads):
        return None  # the shape is refused later, with what is due
    rows = np.arange(shape[0], dtype=np.int64).reshape(heads, -1, 2)
    order: NDArray[np.int64] = rows.swapaxes(1, 2).reshape(-1)
    return order
