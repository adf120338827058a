"""Weights in floats of 8 bits, as DeepSeek, Qwen3-FP8, FBGEMM and compressed-tensors write them.

A matrix ``[N, K]`` is ``weight`` (E4M3 or E5M2) times its scales: one for all, one for each output
``[N, 1]``, or one for each tile ``[N / 128, K / 128]``, both rounded up. DeepSeek calls them
``weight_scale_inv``; they are multiplied all the same.

Sources: transformers' ``integrations/finegrained_fp8.py``, ``integrations/fbgemm_fp8.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qconvert.checkpoint.quantised.fields import ORIGINAL, Field, Fields, is_tile, names, one_of
from qconvert.checkpoint.quantised.grouped import SCALE_DTYPES
from qconvert.checkpoint.quantised.tensors import TensorFiles
from qconvert.errors import QconvertError

if TYPE_CHECKING:
    import torch

DTYPES = ("F8_E4M3", "F8_E5M2")
_PIECE = 1 << 22
_SCALES = ("weight_scale_inv", "weight_scale")
_OF_ACTIVATIONS = ("input_scale", "activation_scale", "input_scale_ub", "output_scale")


@dataclass(frozen=True)
class Float8:
    """What config.json says of it; see ``scheme.Scheme``."""

    name: str
    tile: tuple[int, int] | None
    fields: tuple[Field, ...]

    def owns(self, base: str, files: TensorFiles) -> tuple[str, ...]:
        """The tensors of a quantised matrix; none where it is in floats."""
        if f"{base}.weight" not in files or files[f"{base}.weight"].dtype not in DTYPES:
            return ()
        ends = ("weight", *_SCALES, *_OF_ACTIVATIONS)
        return tuple(name for end in ends if (name := f"{base}.{end}") in files)

    def matrix(self, base: str, shape: tuple[int, int], files: TensorFiles) -> Float8Matrix:
        """A matrix of the checkpoint by its name without ``.weight``.

        Raises:
            QconvertError: tensors that do not fit.
        """
        return float8_matrix(base, shape, files, self.tile, self.name)


def read_float8(raw: Mapping[str, Any], where: str) -> Float8:
    """The fields of a checkpoint of quant_method fp8 or fbgemm_fp8.

    Raises:
        QconvertError: one that is not covered.
    """
    fields = Fields(raw, where, "FP8")
    tile = fields.take(
        "weight_block_size",
        None,
        lambda value: value is None or is_tile(value),
        "two positive numbers are",
        lambda value: (
            "one scale for a matrix or an output" if value is None else "weights that share a scale"
        ),
    )
    fields.take("fmt", "e4m3", one_of("e4m3", "float8_e4m3fn"), "e4m3 is", "4 exponent bits, 3 mantissa bits")
    fields.take(
        "activation_scheme",
        "dynamic",
        one_of("dynamic", "static"),
        "dynamic and static are",
        "how other programs round activations; not done here",
    )
    fields.take("modules_to_not_convert", [], names, "a list of names is", "what is not quantised")
    fields.pass_over("quant_method", "activation_scale_ub", "scale_fmt", "dequantize", "ignored_layers")
    return Float8(str(raw["quant_method"]).lower(), None if tile is None else tuple(tile), fields.finish())


def float8_matrix(
    base: str, shape: tuple[int, int], files: TensorFiles, tile: tuple[int, int] | None, method: str
) -> Float8Matrix:
    """A matrix whose scales are found by their names.

    Raises:
        QconvertError: tensors that do not fit.
    """
    files.expect(f"{base}.weight", DTYPES, shape)
    scales = next((name for end in _SCALES if (name := f"{base}.{end}") in files), None)
    if scales is None:
        raise QconvertError(
            f"{base} has no scales ({' or '.join(_SCALES)})", where=files.folder, hint=ORIGINAL
        )
    if tile is None:
        known = {(), (1,), (1, 1), (shape[0],), (shape[0], 1)}
        tile = (1, shape[1]) if files[scales].shape in {(shape[0],), (shape[0], 1)} else shape
    else:
        known = {(-(-shape[0] // tile[0]), -(-shape[1] // tile[1]))}
    if files[scales].shape not in known or files[scales].dtype not in SCALE_DTYPES:
        found = f"{files[scales].dtype} {list(files[scales].shape)}"
        raise QconvertError(
            f"{scales} is {found}, which is none of {sorted(map(list, known))}",
            where=files.folder,
            hint=ORIGINAL,
        )
    return Float8Matrix(base, shape, files, scales=scales, tile=tile, method=method)


class Float8Matrix:
    """One matrix; see ``computed.Computed``."""

    kept = None

    def __init__(
        self,
        base: str,
        shape: tuple[int, int],
        files: TensorFiles,
        *,
        scales: str,
        tile: tuple[int, int],
        method: str,
    ) -> None:
        self.shape: tuple[int, ...] = shape
        self._weight, self._scales, self._tile = f"{base}.weight", scales, tile
        self._files, self._method = files, method

    @property
    def stored_as(self) -> str:
        """For people."""
        rows, columns = (min(pair) for pair in zip(self._tile, self.shape))
        return f"floats of 8 bits in tiles of {rows} x {columns} ({self._method})"

    @property
    def stored_bytes(self) -> int:
        """Of all its tensors."""
        return self._files.bytes_of(self._weight, self._scales)

    def rows(self, wanted: slice | torch.Tensor) -> torch.Tensor:
        """Some rows in float32."""
        import torch

        picked = torch.arange(self.shape[0])[wanted]
        found = torch.empty(len(picked), self.shape[1])
        weight, scales = self._files.read(self._weight), self._files.read(self._scales).float()
        tiles = [-(-length // size) for length, size in zip(self.shape, self._tile)]
        scales = scales.reshape(tiles)
        columns = torch.arange(self.shape[1]) // self._tile[1]
        step = max(1, _PIECE // self.shape[1])
        for start in range(0, len(picked), step):
            part = picked[start : start + step]
            codes = weight.view(torch.uint8)[part].view(weight.dtype).float()
            found[start : start + step] = codes * scales[part // self._tile[0]][:, columns]
        return found

    def pack(self) -> Any:
        """Never asked for: no block holds floats."""
        raise AssertionError("floats of 8 bits are not kept")

    def order(self) -> None:
        """None."""

    def release(self) -> None:
        """See ``computed.Computed``."""
        self._files.release(self._weight)
