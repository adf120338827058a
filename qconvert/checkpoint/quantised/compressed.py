"""compressed-tensors, as llm-compressor writes them: packed along K, integers of 8 bits, floats of 8 bits.

Packed, for a matrix ``[N, K]`` of b bits in G groups: ``weight_packed`` int32 ``[N, K b / 32]`` with
2^(b - 1) added to every code, ``weight_scale`` ``[N, G]`` (``[N, 1]`` for a channel), ``weight_zero_point``
int32 ``[N b / 32, G]``, packed along N (int8 ``[N, G]`` in earlier versions), ``weight_g_idx`` ``[K]``.
Integers: ``weight`` int8 ``[N, K]`` and the same scales; zero points int8.

Source: compressed-tensors 0.20 ``compressors/pack_quantized``, ``compressors/naive_quantized``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qconvert.checkpoint.quantised.fields import (
    ORIGINAL,
    Field,
    Fields,
    is_tile,
    names_or_expressions,
    one_of,
    truth,
)
from qconvert.checkpoint.quantised.floats8 import DTYPES, Float8Matrix, float8_matrix
from qconvert.checkpoint.quantised.grouped import SCALE_DTYPES, Grouped, Groups
from qconvert.checkpoint.quantised.tensors import TensorFiles
from qconvert.errors import QconvertError
from qconvert.formats.layout import nibbles

if TYPE_CHECKING:
    import torch

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
_HOW = ("observer", "observer_kwargs", "scale_dtype", "zp_dtype")
_ENDS = (
    *("weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
    *("input_scale", "input_zero_point", "output_scale", "output_zero_point"),
)
_STRATEGIES = ("group", "channel", "tensor", "block")


@dataclass(frozen=True)
class _Weights:
    """One of the ``config_groups``."""

    targets: tuple[str, ...]
    bits: int
    kind: str
    symmetric: bool
    strategy: str
    group_size: int | None
    tile: tuple[int, int] | None


@dataclass(frozen=True)
class Compressed:
    """What config.json says of it; see ``scheme.Scheme``."""

    groups: tuple[_Weights, ...]
    ignored: tuple[str, ...]
    fields: tuple[Field, ...]
    name: str = "compressed-tensors"

    def owns(self, base: str, files: TensorFiles) -> tuple[str, ...]:
        """The tensors of a quantised matrix; none where it is in floats."""
        plain = f"{base}.weight"
        packed = f"{base}.weight_packed" in files
        if not packed and (plain not in files or files[plain].dtype not in ("I8", *DTYPES)):
            return ()
        return tuple(name for end in _ENDS if (name := f"{base}.{end}") in files)

    def matrix(self, base: str, shape: tuple[int, int], files: TensorFiles) -> Grouped | Float8Matrix:
        """A matrix of the checkpoint by its name without ``.weight``.

        Raises:
            QconvertError: tensors that do not fit, or a matrix that no group names.
        """
        weights = self._of(base, files)
        if weights.kind == "float":
            return float8_matrix(base, shape, files, weights.tile, self.name)
        packed = f"{base}.weight_packed" in files
        (rows, columns), bits = shape, weights.bits
        if packed:
            files.expect(f"{base}.weight_packed", ("I32",), (rows, -(-columns * bits // 32)))
        else:
            files.expect(f"{base}.weight", ("I8",), shape)
        length = weights.group_size if weights.strategy == "group" else columns
        assert length is not None, "checked when it was read"
        count = -(-columns // length)
        scales = f"{base}.weight_scale"
        whole = weights.strategy == "tensor" and scales in files and files[scales].shape in ((), (1,))
        files.expect(scales, tuple(SCALE_DTYPES), files[scales].shape if whole else (rows, count))
        of_inputs = self._order(base, columns, length, count, files)
        groups = Groups(bits, length, weights.symmetric, SCALE_DTYPES[files[scales].dtype], of_inputs)
        if not packed:
            _expect_small(f"{base}.weight", bits, files)
        if not weights.symmetric:
            _expect_zeros(base, rows, count, bits, files)
        return CompressedMatrix(base, shape, groups, packed, files)

    def _of(self, base: str, files: TensorFiles) -> _Weights:
        found = None if matches(base, self.ignored) else self._group(base)
        if found is None:
            raise QconvertError(
                f"{base} is quantised, although no group of config.json names it",
                where=files.folder / "config.json",
                hint=ORIGINAL,
            )
        return found

    def _group(self, base: str) -> _Weights | None:
        named = (group for group in self.groups if matches(base, group.targets))
        return next(named, None) or next((group for group in self.groups if "Linear" in group.targets), None)

    @staticmethod
    def _order(base: str, columns: int, length: int, count: int, files: TensorFiles) -> torch.Tensor | None:
        import torch

        name = f"{base}.weight_g_idx"
        if name not in files:
            return None
        files.expect(name, ("I32", "I64"), (columns,))
        found = files.read(name).long()
        if bool((found == -1).all()):  # registered, and never set
            return None
        if int(found.min()) < 0 or int(found.max()) >= count:
            what = f"{name} names a group of {count} that is not there"
            raise QconvertError(what, where=files.folder, hint=ORIGINAL)
        return None if torch.equal(found, torch.arange(columns) // length) else found.clone()


def matches(base: str, targets: Sequence[str]) -> bool:
    """Whether one of these names or expressions (``re:``) means a module."""
    return any(
        re.match(target.removeprefix("re:"), base) if target.startswith("re:") else target == base
        for target in targets
    )


def _expect_zeros(base: str, rows: int, count: int, bits: int, files: TensorFiles) -> None:
    name = f"{base}.weight_zero_point"
    if name in files and files[name].dtype == "I32":
        files.expect(name, ("I32",), (-(-rows * bits // 32), count))
    else:
        files.expect(name, ("I8",), (rows, count))
        _expect_small(name, bits, files)


def _expect_small(name: str, bits: int, files: TensorFiles) -> None:
    """Bytes that hold numbers of fewer bits: larger ones would be cut when they are packed."""
    if bits == 8:
        return
    found, half = files.read(name), 1 << (bits - 1)
    least, most = int(found.min()), int(found.max())
    if least < -half or most >= half:
        what = f"{name} has numbers from {least} to {most}, which {bits} bits do not hold"
        raise QconvertError(what, where=files.folder, hint=ORIGINAL)


def read_compressed(raw: Mapping[str, Any], where: str) -> Compressed:
    """The fields of a checkpoint of compressed-tensors.

    Raises:
        QconvertError: one that is not covered.
    """
    fields = Fields(raw, where, "compressed-tensors")
    fields.take("format", None, one_of(*_FORMATS), f"{', '.join(_FORMATS)} are", "how codes are stored")
    fields.take("quantization_status", "compressed", one_of("compressed", "frozen"), "compressed is")
    fields.take(
        "sparsity_config",
        {},
        lambda value: isinstance(value, dict) and value.get("format", "dense") == "dense",
        "weights with holes are not read",
    )
    fields.take("transform_config", {}, lambda value: value == {}, "rotated weights are not read")
    ignored = fields.take(
        "ignore", [], names_or_expressions, "a list of names and expressions is", "what is not quantised"
    )
    groups = fields.take(
        "config_groups", None, lambda value: isinstance(value, dict) and bool(value), "at least one group is"
    )
    fields.pass_over("quant_method", "global_compression_ratio", "version")
    fields.told.pop()  # each group is told by itself
    scheme = raw.get("kv_cache_scheme")
    fields.pass_over("kv_cache_scheme")
    if scheme is not None:
        bits = scheme.get("num_bits") if isinstance(scheme, Mapping) else scheme
        meaning = "bits in which other programs keep keys and values; here --kv-cache says it"
        fields.told.append(Field("kv_cache_scheme", bits, meaning))
    found = [_read_group(name, group, fields, where) for name, group in groups.items()]
    return Compressed(tuple(found), tuple(ignored), fields.finish())


def _read_group(name: str, group: Any, outer: Fields, where: str) -> _Weights:
    if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
        raise outer.refusal(f"config_groups.{name}", group, "a group with weights is")
    if group.get("format") not in (None, *_FORMATS):
        raise outer.refusal(f"{name}.format", group["format"], f"{', '.join(_FORMATS)} are")
    targets = group.get("targets")
    if not isinstance(targets, list) or not names_or_expressions(targets):
        raise outer.refusal(f"{name}.targets", targets, "a list of names and expressions is")
    fields = Fields(group["weights"], f"{where}, config_groups, {name}", "compressed-tensors")
    kind = fields.take("type", "int", one_of("int", "float"), "int and float are", "of every code")
    allowed = (8,) if kind == "float" else (4, 8)
    bits = fields.take("num_bits", 8, one_of(*allowed), f"{' and '.join(map(str, allowed))} are", "of a code")
    symmetric = fields.take("symmetric", True, truth, "true or false is", "without zero points, if true")
    strategy = fields.take(
        "strategy", None, one_of(*_STRATEGIES), f"{', '.join(_STRATEGIES)} are", "of scales"
    )
    group_size = fields.take(
        "group_size",
        None,
        lambda value: (type(value) is int and value > 0) if strategy == "group" else value in (None, -1),
        "a positive number for groups, and for nothing else, is",
        "weights that share a scale",
    )
    tile = fields.take(
        "block_structure",
        None,
        lambda value: (value is None) if strategy != "block" else is_tile(value),
        "two numbers for blocks, and for nothing else, are",
        "weights that share a scale",
    )
    fields.take("dynamic", False, one_of(False), "weights whose scales are found while they run are not read")
    fields.take(
        "actorder",
        None,
        one_of(None, False, True, "weight", "group", "static", "dynamic"),
        "weight and group are",
        "how columns were taken while they were rounded",
    )
    fields.pass_over(*_HOW)
    if (kind == "float" and strategy == "group") or (kind == "int" and strategy == "block"):
        raise outer.refusal(f"{name}.strategy", strategy, f"it is not known with type {kind}")
    for key in ("input_activations", "output_activations"):
        if isinstance(of_other := group.get(key), dict):
            meaning = "bits to which other programs round activations; not done here"
            outer.told.append(Field(f"{name}.{key}", of_other.get("num_bits"), meaning))
    outer.told += [Field(f"{name}.{each.key}", each.value, each.meaning) for each in fields.finish()]
    return _Weights(
        tuple(targets), bits, kind, symmetric, strategy, group_size, None if tile is None else tuple(tile)
    )


class CompressedMatrix(Grouped):
    """One matrix of integers; see ``grouped.Grouped``."""

    def __init__(
        self, base: str, shape: tuple[int, int], groups: Groups, packed: bool, files: TensorFiles
    ) -> None:
        self._base, self._packed = base, packed
        owned = tuple(name for end in _ENDS[:6] if (name := f"{base}.{end}") in files)
        super().__init__(shape, groups, files, owned, "compressed-tensors")

    def _dequantise(self, rows: torch.Tensor) -> torch.Tensor:
        """(q - z) s with signed q and z, as the format means them."""
        import torch

        bits, columns = self.groups.bits, self.shape[1]
        half = 1 << (bits - 1)
        if self._packed:
            words = self._read("weight_packed")[rows]
            fields = torch.stack([words >> shift for shift in range(0, 32, bits)], -1).flatten(1)
            values = (fields & ((1 << bits) - 1))[:, :columns] - half
        else:
            values = self._read("weight")[rows].int()
        of_inputs = self.groups.of_inputs
        if of_inputs is None:
            of_inputs = torch.arange(columns) // self.groups.length
        if not self.groups.symmetric:
            zeros = self._read("weight_zero_point")
            if zeros.dtype == torch.int32:
                per_word = 32 // bits
                shifts = (rows % per_word * bits).int()[:, None]
                zeros = ((zeros[rows // per_word] >> shifts) & ((1 << bits) - 1)) - half
            else:
                zeros = zeros[rows].int()
            values = values - zeros[:, of_inputs]
        return values * self._scales()[rows][:, of_inputs]

    def _codes(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        import torch

        (rows, columns), bits, half = self.shape, self.groups.bits, 1 << (self.groups.bits - 1)
        if self._packed:
            codes = _fields(self._read("weight_packed"), bits)[:, :columns]
        else:
            codes = self._read("weight").view(torch.uint8) + half  # a byte goes around: -1 is 127 then
        zeros = None
        if not self.groups.symmetric:
            found = self._read("weight_zero_point")
            if found.dtype == torch.int32:
                zeros = _fields(found.t(), bits)[:, :rows].t()
            else:
                zeros = (found.int() + half).to(torch.uint8)
        return codes, self._scales(), zeros

    def _scales(self) -> torch.Tensor:
        scales = self._read("weight_scale").float()
        return scales.reshape(1, 1).expand(self.shape[0], 1) if scales.numel() == 1 else scales

    def _read(self, end: str) -> torch.Tensor:
        return self._files.read(f"{self._base}.{end}")


def _fields(words: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 ``[n, m 32 / bits]`` of little-endian words ``[n, m]``, byte by byte."""
    import torch

    packed = words.contiguous().view(torch.uint8)
    return packed if bits == 8 else nibbles(packed)
