"""Codes of GGUF's simple types as blocks of ``MatMulNBits``, bit for bit.

A block is 32 weights with a scale d (float16) and, in the types that end with 1, a smallest value m:

    Q4_0  (q - 8) d      4 bits about 8                     Q4_1  q d + m    4 bits, zero point -m / d
    Q5_0  (q - 16) d     8 bits: q + 112 about 128          Q5_1  q d + m    8 bits, zero point -m / d
    Q8_0  q d            8 bits: q + 128 about 128

Zero points of blocks are whole numbers of 4 or 8 bits. Where m is no whole multiple of d, the nearest one is
taken, z, and the residual m + d z is stored beside it in float32, to be added to all weights of the block.
(ONNX Runtime takes zero points of float32 as well, and is 60 times slower then.)

Source: ggml-common.h and ggml-quants.c of ggml.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

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
# Rows that are looked at together, to see whether a matrix has residuals: mostly the first have.
_ROWS = 256


class Codes(NamedTuple):
    """Some rows of a matrix: codes uint8 ``[n, K]``, scales float16, zero points uint8, residuals float32.

    The latter three are ``[n, K / 32]``, or None where the type has no smallest values.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    residuals: torch.Tensor | None


def keep(kind: Kind, content: NDArray[np.uint8]) -> Kept:
    """How a matrix's codes are kept.

    Args:
        kind: one of ``EXACT``.
        content: its bytes ``[N, bytes of a row]``.
    """
    symmetric = kind not in _WITH_SMALLEST
    residuals = not symmetric and any(
        bool(_zeros_and_residuals(kind, _blocks(kind, content[start : start + _ROWS]))[1].any())
        for start in range(0, len(content), _ROWS)
    )
    return Kept(BlockFormat(_BITS[kind], BLOCK, symmetric, scale_dtype="float16", residuals=residuals))


def codes_of(kind: Kind, content: NDArray[np.uint8]) -> Codes:
    """What these bytes ``[n, bytes of a row]`` hold."""
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
    packed = torch.from_numpy(codes.reshape(len(codes), -1).astype(np.uint8))
    if kind not in _WITH_SMALLEST:
        return Codes(packed, torch.from_numpy(scales.copy()), None, None)
    zeros, residuals = _zeros_and_residuals(kind, blocks)
    return Codes(
        packed, torch.from_numpy(scales.copy()), torch.from_numpy(zeros), torch.from_numpy(residuals)
    )


def _blocks(kind: Kind, content: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(content).reshape(len(content), -1, _BYTES[kind])


def _zeros_and_residuals(
    kind: Kind, blocks: NDArray[np.uint8]
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Zero points z and residuals r with d (q - z) + r = d q + m, as real numbers and so when rounded.

    The sum is exact in float64. Where a smallest value is so much larger than its scale that float32 could
    not hold r, z is 0 and r is m. NaN and Inf stay in r.
    """
    pairs = np.ascontiguousarray(blocks[..., :4]).view(np.float16).astype(np.float64)
    scale, smallest = pairs[..., 0], pairs[..., 1]
    with np.errstate(all="ignore"):
        zeros = np.clip(np.round(-smallest / scale), 0, (1 << _BITS[kind]) - 1)
        zeros = np.where(np.isfinite(scale) & (scale != 0) & np.isfinite(smallest), zeros, 0)
        residuals = smallest + zeros * scale
        inexact = residuals.astype(np.float32) != residuals
        zeros, residuals = np.where(inexact, 0, zeros), np.where(inexact, smallest, residuals)
    return zeros.astype(np.uint8), residuals.astype(np.float32)
