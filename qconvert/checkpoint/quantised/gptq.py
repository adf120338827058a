"""GPTQ as AutoGPTQ and GPTQModel write it: codes along K in int32, zero points along N, an order of inputs.

For a matrix ``[N, K]`` of b bits in G groups: ``qweight`` int32 ``[K b / 32, N]``, ``qzeros`` int32
``[G, N b / 32]``, ``scales`` ``[G, N]``, ``g_idx`` int32 ``[K]`` (the group of every input). The first code
is in the lowest bits. Version 1 stores zero points less 1, version 2 as they are.

Sources: AutoGPTQ 0.7 ``qlinear_cuda_old.py``; GPTQModel 7 ``nn_modules/qlinear/torch.py`` and
``utils/model.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qconvert.checkpoint.quantised.fields import ORIGINAL, Field, Fields, is_expression, one_of, truth
from qconvert.checkpoint.quantised.grouped import SCALE_DTYPES, Grouped, Groups
from qconvert.checkpoint.quantised.tensors import TensorFiles
from qconvert.errors import QconvertError

if TYPE_CHECKING:
    import torch

_HOW = (
    *("damp_percent", "damp_auto_increment", "true_sequential", "model_name_or_path", "model_file_base_name"),
    *("meta", "quantizer", "dataset", "tokenizer", "cache_block_outputs", "block_name_to_quantize", "mse"),
    *("module_name_preceding_first_block", "batch_size", "pad_token_id", "use_cuda_fp16", "model_seqlen"),
    *("use_exllama", "max_input_length", "exllama_config", "disable_exllama", "modules_in_block_to_quantize"),
    *("static_groups", "is_marlin_format", "offload_to_disk", "offload_to_disk_path", "act_group_aware"),
    *("parallel_packing", "backend", "quant_method", "method", "lm_head", "hyb_act", "compute_device_filter"),
    *("auto_forward_data_parallelism", "gc_mode", "wait_for_submodule_finalizers", "pack_impl", "uri"),
    # AutoRound's, which writes the same format.
    *("amp", "autoround_version", "enable_minmax_tuning", "enable_norm_bias_tuning", "enable_quanted_input"),
    *("gradient_accumulate_steps", "iters", "low_gpu_mem_usage", "lr", "minmax_lr", "nsamples", "seqlen"),
    *("scale_dtype", "train_bs"),
    *("mock_quantization", "damp_multiplier", "hessian", "failsafe", "fallback", "group_aware"),
)
_ENDS = ("qweight", "qzeros", "scales", "g_idx")
_OVERRIDES = ("bits", "group_size", "sym", "desc_act")


@dataclass(frozen=True)
class GPTQ:
    """What config.json or quantize_config.json says of it; see ``scheme.Scheme``."""

    bits: int
    group_size: int
    first_zero: int
    dynamic: Mapping[str, Any]
    fields: tuple[Field, ...]
    name: str = "gptq"

    def owns(self, base: str, files: TensorFiles) -> tuple[str, ...]:
        """The tensors of a quantised matrix; none where it is in floats."""
        if f"{base}.qweight" not in files:
            return ()
        return tuple(name for end in _ENDS if (name := f"{base}.{end}") in files)

    def matrix(self, base: str, shape: tuple[int, int], files: TensorFiles) -> GPTQMatrix:
        """A matrix of the checkpoint by its name without ``.weight``.

        Raises:
            QconvertError: tensors that do not fit, or zero points about which programs differ.
        """
        rows, columns = shape
        bits, length = self._of(base)
        length = columns if length == -1 else length
        per_word, count = 32 // bits, -(-columns // length)
        if rows % per_word or columns % per_word:
            what = f"{base}: a matrix {rows} x {columns} is not packed in whole words"
            raise QconvertError(what, where=files.folder, hint=ORIGINAL)
        files.expect(f"{base}.qweight", ("I32",), (columns // per_word, rows))
        files.expect(f"{base}.qzeros", ("I32",), (count, rows // per_word))
        files.expect(f"{base}.scales", tuple(SCALE_DTYPES), (count, rows))
        of_inputs = self._groups_of_inputs(base, columns, length, count, files)
        zeros = unpacked(files.read(f"{base}.qzeros"), bits)
        highest = int(zeros.max()) + self.first_zero
        if highest >= 1 << bits:
            raise QconvertError(
                f"{base}.qzeros has a zero point of {highest}, which {bits} bits do not hold: programs "
                "differ in what they make of it",
                where=files.folder,
                hint=ORIGINAL,
            )
        symmetric = bool((zeros + self.first_zero == 1 << (bits - 1)).all())
        scale_dtype = SCALE_DTYPES[files[f"{base}.scales"].dtype]
        groups = Groups(bits, length, symmetric, scale_dtype, of_inputs)
        return GPTQMatrix(base, shape, groups, self.first_zero, files)

    def _of(self, base: str) -> tuple[int, int]:
        """Bits and group size of a matrix."""
        for pattern, values in self.dynamic.items():
            if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), base):
                return values.get("bits", self.bits), values.get("group_size", self.group_size)
        return self.bits, self.group_size

    def _groups_of_inputs(
        self, base: str, columns: int, length: int, count: int, files: TensorFiles
    ) -> torch.Tensor | None:
        import torch

        if f"{base}.g_idx" not in files:
            return None
        files.expect(f"{base}.g_idx", ("I32", "I64"), (columns,))
        found = files.read(f"{base}.g_idx").long()
        if int(found.min()) < 0 or int(found.max()) >= count:
            raise QconvertError(
                f"{base}.g_idx names a group of {count} that is not there",
                where=files.folder,
                hint="download the whole checkpoint again",
            )
        return None if torch.equal(found, torch.arange(columns) // length) else found.clone()


def read_gptq(raw: Mapping[str, Any], where: str) -> GPTQ:
    """The fields of a GPTQ checkpoint.

    Raises:
        QconvertError: one that is not covered.
    """
    fields = Fields(raw, where, "GPTQ")
    bits = fields.take("bits", None, one_of(4, 8), "4 and 8 bits are", "of every code")
    group_size = fields.take(
        "group_size",
        128,
        _length,
        "a positive number is, or -1",
        lambda value: "a scale for every output" if value == -1 else "weights that share a scale",
    )
    fields.take("sym", True, truth, "true or false is", _zero_meaning)
    fields.take(
        "desc_act",
        False,
        truth,
        "true or false is",
        lambda value: "groups follow an order of inputs" if value else "groups as inputs come",
    )
    form = fields.take(
        "checkpoint_format",
        raw.get("format"),
        one_of(None, "gptq", "gptq_v2"),
        "gptq and gptq_v2 are",
        lambda value: "zero points as they are" if value == "gptq_v2" else "zero points are stored less 1",
    )
    fields.take("pack_dtype", "int32", one_of("int32"), "int32 is", "what codes are packed in")
    fields.take("data_type", "int", one_of("int"), "int is", "what a code is")
    dynamic = fields.take(
        "dynamic",
        {},
        _overrides,
        f"patterns of names with {', '.join(_OVERRIDES)} are",
        "other bits for some",
    )
    if raw.get("is_marlin_format"):
        raise fields.refusal("is_marlin_format", True, "codes in Marlin's order are not read")
    fields.pass_over(*_HOW, "format")
    return GPTQ(bits, group_size, 0 if form == "gptq_v2" else 1, dynamic, fields.finish())


def _length(value: Any) -> bool:
    return type(value) is int and (value == -1 or value > 0)


def _overrides(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    for pattern, values in value.items():
        if not is_expression(pattern.removeprefix("+:").removeprefix("-:")):
            return False
        known = isinstance(values, dict) and set(values) <= set(_OVERRIDES)
        if not known or not one_of(4, 8)(values.get("bits", 4)) or not _length(values.get("group_size", 1)):
            return False
    return True


def _zero_meaning(symmetric: bool) -> str:
    return "zero is the middle code" if symmetric else "every group has a zero point"


class GPTQMatrix(Grouped):
    """One matrix; see ``grouped.Grouped``."""

    def __init__(
        self, base: str, shape: tuple[int, int], groups: Groups, first_zero: int, files: TensorFiles
    ) -> None:
        parts = tuple(f"{base}.{part}" for part in _ENDS)
        self._base, self._first_zero = base, first_zero
        super().__init__(shape, groups, files, tuple(part for part in parts if part in files), "gptq")

    def _dequantise(self, rows: torch.Tensor) -> torch.Tensor:
        import torch

        bits, columns = self.groups.bits, self.shape[1]
        words = self._files.read(f"{self._base}.qweight")[:, rows]
        shifts, mask = torch.arange(0, 32, bits, dtype=torch.int32), (1 << bits) - 1
        codes = ((words[:, None, :] >> shifts[None, :, None]) & mask).reshape(columns, len(rows))
        zeros = unpacked(self._files.read(f"{self._base}.qzeros"), bits)[:, rows] + self._first_zero
        scales = self._files.read(f"{self._base}.scales")[:, rows].float()
        of_inputs = self.groups.of_inputs
        if of_inputs is None:
            of_inputs = torch.arange(columns) // self.groups.length
        return (scales[of_inputs] * (codes - zeros[of_inputs])).t()

    def _codes(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        import torch

        bits, (rows, columns) = self.groups.bits, self.shape
        words = self._files.read(f"{self._base}.qweight").t().contiguous().numpy().astype("<i4", copy=False)
        codes = _from_bytes(words.view(np.uint8), bits).reshape(rows, columns)
        zero_words = self._files.read(f"{self._base}.qzeros").contiguous().numpy().astype("<i4", copy=False)
        zeros = _from_bytes(zero_words.view(np.uint8), bits) + np.uint8(self._first_zero)
        scales = self._files.read(f"{self._base}.scales").float().t()
        return torch.from_numpy(codes), scales, torch.from_numpy(zeros).t()


def unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 codes ``[n, m 32 / bits]`` of words ``[n, m]``, the lowest bits first."""
    import torch

    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((words[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2)


def _from_bytes(packed: np.ndarray[Any, np.dtype[np.uint8]], bits: int) -> np.ndarray[Any, Any]:
    """Codes of little-endian words, byte by byte: ``[n, m]`` bytes are ``[n, m 8 / bits]`` codes."""
    codes: np.ndarray[Any, Any] = packed.copy()
    if bits == 4:
        codes = np.stack((packed & 15, packed >> 4), axis=-1).reshape(len(packed), -1)
    return codes
