"""Codes of GGUF's simple types as blocks of ``MatMulNBits``, bit for bit.

A block is 32 weights with a scale d (float16) and, in the types that end with 1, a smallest value m:

    Q4_0  (q - 8) d      4 bits about 8                     Q4_1  q d + m    4 bits, zero point -m / d
    Q5_0  (q - 16) d     8 bits: q + 112 about 128          Q5_1  q d + m    8 bits, zero point -m / d
    Q8_0  q d            8 bits: q + 128 about 128

Zero points of blocks are whole numbers of 4 or 8 bits, so a type with m has a place only if every m is a
whole multiple of its d. (ONNX Runtime takes zero points of float32 as well, and is 60 times slower then.)

Source: ggml-common.h and ggml-quants.c of ggml.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray

from qconvert.formats.recipe import BlockFormat, Kept

if TYPE_CHECKING:
    import torch

BLOCK = 32
_BYTES = {Kind.Q4_0: 18, Kind.Q4_1: 20, Kind.Q5_0: 22, Kind.Q5_1: 24, Kind.Q8_0: 34}
_BITS = {Kind.Q4_0: 4, Kind.Q4_1: 4, Kind.Q5_0: 8, Kind.Q5_1: 8, Kind.Q8_0: 8}
_WITH_SMALLEST = (Kind.Q4_1, Kind.Q5_1)
# What is added to a code, so that it is one about the middle of its bits.
_SHIFT = {Kind.Q4_0: 0, Kind.Q4_1: 0, Kind.Q5_0: 112, Kind.Q5_1: 0, Kind.Q8_0: 128}
EXACT = tuple(_BYTES)


def keep(kind: Kind, content: NDArray[np.uint8]) -> Kept | None:
    """How a matrix's codes can be kept; None where no whole zero points give its smallest values.

    Args:
        kind: one of ``EXACT``.
        content: its bytes ``[N, bytes of a row]``.
    """
    symmetric = kind not in _WITH_SMALLEST
    if not symmetric and _zero_points(kind, _blocks(kind, content)) is None:
        return None
    return Kept(BlockFormat(_BITS[kind], BLOCK, symmetric, scale_dtype="float16"))


def codes_of(
    kind: Kind, content: NDArray[np.uint8]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes uint8 ``[N, K]``, scales float16 ``[N, K / 32]``, and zero points of that shape or None."""
    import torch

    blocks = _blocks(kind, content)
    scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
    if kind == Kind.Q8_0:
        codes = blocks[..., 2:] ^ 0x80  # a signed byte and 128
    else:
        nibbles = blocks[..., -16:]
        codes = np.concatenate((nibbles & 15, nibbles >> 4), axis=-1)
        if kind in (Kind.Q5_0, Kind.Q5_1):
            high = np.unpackbits(blocks[..., -20:-16], axis=-1, bitorder="little")
            codes = codes | (high << 4)
        codes = codes + np.uint8(_SHIFT[kind])
    zeros = _zero_points(kind, blocks) if kind in _WITH_SMALLEST else None
    return (
        torch.from_numpy(codes.reshape(len(codes), -1).astype(np.uint8)),
        torch.from_numpy(scales.copy()),
        None if zeros is None else torch.from_numpy(zeros),
    )


def _blocks(kind: Kind, content: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(content).reshape(len(content), -1, _BYTES[kind])


def _zero_points(kind: Kind, blocks: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
    """Those whose scaled values are exactly the smallest ones, or None."""
    pairs = np.ascontiguousarray(blocks[..., :4]).view(np.float16).astype(np.float32)
    scale, smallest = pairs[..., 0], pairs[..., 1]
    with np.errstate(all="ignore"):
        zeros = np.where(scale == 0, 0, np.round(-smallest / scale))
        good = (zeros >= 0) & (zeros < 1 << _BITS[kind]) & (-zeros * scale == smallest)
    return zeros.astype(np.uint8) if bool(good.all()) else None
