"""AWQ's gemm packing: eight 4-bit codes of neighbouring outputs in an int32, in an order of their own.

For a matrix ``[N, K]`` in G groups: ``qweight`` int32 ``[K, N / 8]``, ``qzeros`` int32 ``[G, N / 8]``,
``scales`` ``[G, N]``. Of the outputs 8 i to 8 i + 7 the lowest bits hold the first, then come the third,
fifth and seventh, then the second, fourth, sixth and eighth.

Source: AutoAWQ 0.2.9 ``awq/modules/linear/gemm.py``, ``awq/utils/packing_utils.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qconvert.checkpoint.quantised.fields import ORIGINAL, Field, Fields, names, one_of, truth
from qconvert.checkpoint.quantised.grouped import SCALE_DTYPES, Grouped, Groups
from qconvert.checkpoint.quantised.tensors import TensorFiles
from qconvert.errors import QconvertError

if TYPE_CHECKING:
    import torch

_ENDS = ("qweight", "qzeros", "scales")
_BITS = 4
_PER_WORD = 32 // _BITS
_OUTPUT_OF_PLACE = (0, 2, 4, 6, 1, 3, 5, 7)
_SHIFT_OF_OUTPUT = (0, 16, 4, 20, 8, 24, 12, 28)
_HOW = ("quant_method", "backend", "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "exllama_config")


@dataclass(frozen=True)
class AWQ:
    """What config.json says of it; see ``scheme.Scheme``."""

    group_size: int
    fields: tuple[Field, ...]
    name: str = "awq"

    def owns(self, base: str, files: TensorFiles) -> tuple[str, ...]:
        """The tensors of a quantised matrix; none where it is in floats."""
        if f"{base}.qweight" not in files:
            return ()
        return tuple(name for end in _ENDS if (name := f"{base}.{end}") in files)

    def matrix(self, base: str, shape: tuple[int, int], files: TensorFiles) -> AWQMatrix:
        """A matrix of the checkpoint by its name without ``.weight``.

        Raises:
            QconvertError: tensors that do not fit.
        """
        rows, columns = shape
        length = columns if self.group_size == -1 else self.group_size
        if rows % _PER_WORD or columns % length:
            what = f"{base}: a matrix {rows} x {columns} has no whole groups of {length}"
            raise QconvertError(what, where=files.folder, hint=ORIGINAL)
        files.expect(f"{base}.qweight", ("I32",), (columns, rows // _PER_WORD))
        files.expect(f"{base}.qzeros", ("I32",), (columns // length, rows // _PER_WORD))
        files.expect(f"{base}.scales", tuple(SCALE_DTYPES), (columns // length, rows))
        middle = 0x88888888 - (1 << 32)  # eight codes of 8 in a signed word
        symmetric = bool((files.read(f"{base}.qzeros") == middle).all())
        groups = Groups(_BITS, length, symmetric, SCALE_DTYPES[files[f"{base}.scales"].dtype])
        return AWQMatrix(base, shape, groups, files)


def read_awq(raw: Mapping[str, Any], where: str) -> AWQ:
    """The fields of an AWQ checkpoint.

    Raises:
        QconvertError: one that is not covered.
    """
    fields = Fields(raw, where, "AWQ")
    fields.take("bits", raw.get("w_bit"), one_of(_BITS), "4 bits are", "of every code")
    group_size = fields.take(
        "group_size",
        raw.get("q_group_size", 128),
        lambda value: type(value) is int and (value == -1 or value > 0),
        "a positive number is, or -1",
        "weights that share a scale",
    )
    fields.take(
        "zero_point",
        True,
        truth,
        "true or false is",
        lambda value: "every group has a zero point" if value else "zero is the middle code",
    )
    fields.take(
        "version",
        "gemm",
        lambda value: isinstance(value, str) and value.lower() == "gemm",
        "the packing gemm is (others are gemv, gemv_fast, marlin, exllama, ipex)",
        "how codes are packed: along the outputs, in an order of their own",
    )
    fields.take("modules_to_not_convert", [], names, "a list of names is", "what is not quantised")
    fields.pass_over(*_HOW, "w_bit", "q_group_size")
    return AWQ(group_size, fields.finish())


class AWQMatrix(Grouped):
    """One matrix; see ``grouped.Grouped``."""

    def __init__(self, base: str, shape: tuple[int, int], groups: Groups, files: TensorFiles) -> None:
        self._base = base
        parts = tuple(f"{base}.{part}" for part in _ENDS)
        super().__init__(shape, groups, files, parts, "awq")

    def _dequantise(self, rows: torch.Tensor) -> torch.Tensor:
        import torch

        shifts = torch.tensor(_SHIFT_OF_OUTPUT, dtype=torch.int32)[rows % _PER_WORD]
        codes, zeros = (
            (self._files.read(f"{self._base}.{part}")[:, rows // _PER_WORD] >> shifts) & 15
            for part in ("qweight", "qzeros")
        )
        scales = self._files.read(f"{self._base}.scales")[:, rows].float()
        groups = codes.view(scales.shape[0], -1, len(rows))
        return ((groups - zeros[:, None]) * scales[:, None]).flatten(0, 1).t()

    def _codes(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        import torch

        codes, zeros = (
            torch.from_numpy(_unpacked(self._files.read(f"{self._base}.{part}"))).t()
            for part in ("qweight", "qzeros")
        )
        return codes, self._files.read(f"{self._base}.scales").float().t(), zeros


def _unpacked(words: torch.Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """uint8 ``[n, 8 m]`` in the order of the outputs, of words ``[n, m]``; byte by byte."""
    packed = words.contiguous().numpy().astype("<i4", copy=False).view(np.uint8)
    places = np.stack((packed & 15, packed >> 4), axis=-1).reshape(len(packed), -1, _PER_WORD)
    found = np.empty_like(places)
    found[..., list(_OUTPUT_OF_PLACE)] = places
    return found.reshape(len(packed), -1)
