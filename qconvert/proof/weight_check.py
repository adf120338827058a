"""Every stored weight against the checkpoint, tensor by tensor, within the rounding of its format."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qconvert.checkpoint.computed import computed_of
from qconvert.checkpoint.weights import CheckpointWeights
from qconvert.formats.layout import PIECE, Rounding
from qconvert.formats.record import Digest
from qconvert.formats.stored import VOCABULARY
from qconvert.models.families import rope_tables
from qconvert.proof.exported_weights import ExportedWeights

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# float32 angles: inverse frequencies of two builds of PyTorch may differ in their last bit, which
# grows with the position; on top of that the tables' own rounding.
_ROPE_TOLERANCE = {"float32": 1e-6, "float16": 5e-4}
_ROPE_TOLERANCE_PER_POSITION = 2.0**-21
_TINY = 1e-30


@dataclass(frozen=True)
class WeightFault:
    """A tensor whose stored values are not the checkpoint's: its name and what is wrong, with the place."""

    tensor: str
    what: str


@dataclass(frozen=True)
class WeightCheck:
    """Outcome of comparing every stored weight with the checkpoint.

    ``worst_steps`` is the largest error of a quantised weight in rounding steps of its block (0.5 is
    what rounding to nearest leaves at most), found in ``worst_tensor``; 0 where nothing is quantised.
    ``moved_tensors`` were rounded by a calibration; ``moved_steps`` is the largest mean of their blocks'
    largest errors, ``common_steps`` the largest error that the weights of a row or a column have in common.
    """

    tensors: int
    values: int
    worst_steps: float
    worst_tensor: str | None
    faults: tuple[WeightFault, ...]
    moved_tensors: int = 0
    moved_steps: float = 0.0
    common_steps: float = 0.0


@dataclass(frozen=True)
class MovedWeights:
    """Weights that a calibration rounded on purpose: their digests, and how many steps they may be off.

    ``limit_common`` is for a row or a column as a whole. Steps are those of ``bits``, also where a matrix
    among them has more: what it makes up for is what the others leave. Embedding and head leave nothing.
    """

    digests: Mapping[str, str]
    limit_steps: float
    limit_common: float
    bits: int

    def finer(self, name: str, fmt: Rounding) -> float:
        """How many steps of a tensor are one in which the limits are told."""
        return 1.0 if name in VOCABULARY else ((1 << fmt.bits) - 1) / ((1 << self.bits) - 1)


class _MovedTensor:
    """What is asked of one of them, piece by piece."""

    def __init__(self, finer: float) -> None:
        self._finer = finer
        self._digest = Digest()
        self._total, self._blocks, self._rows = 0.0, 0, 0
        self._of_rows = 0.0
        self._crossed: torch.Tensor | float = 0.0
        self._squares: torch.Tensor | float = 0.0

    def add(self, true: torch.Tensor, stored: torch.Tensor, fmt: Rounding) -> None:
        """Some rows ``[rows, columns]``."""
        self._digest.add(stored)
        worst = error_in_steps(true, stored, fmt)
        self._total += float(worst.sum())
        self._blocks += worst.numel()
        steps = _step_of_each(true, fmt)
        values = true / steps
        crossed, squares = values * (stored - true) / steps, values.square()
        self._of_rows = max(self._of_rows, float(_common(crossed, squares, 1).max()))
        self._crossed, self._squares = self._crossed + crossed.sum(0), self._squares + squares.sum(0)
        self._rows += len(true)

    @property
    def steps(self) -> float:
        """Mean over the blocks of the largest error in each."""
        return self._total / self._blocks / self._finer

    @property
    def common(self) -> float:
        """The largest error that all weights of a row or of a column have in common, in steps.

        That is how much longer or shorter it is than the checkpoint's, times the root of its mean square.
        """
        import torch

        assert isinstance(self._crossed, torch.Tensor)
        assert isinstance(self._squares, torch.Tensor)
        columns = self._crossed.abs() / (self._squares * self._rows).clamp(min=_TINY).sqrt()
        return max(self._of_rows, float(columns.max())) / self._finer

    def fault(self, digest: str, limits: MovedWeights) -> str | None:
        if not self.steps <= limits.limit_steps:
            return (
                f"blocks are off by {self.steps:.3g} steps on average, {limits.limit_steps:g} at most are due"
            )
        # What makes up for the others' errors does so with whole columns.
        common = limits.limit_common * (2 if self._finer > 1 else 1)
        if not self.common <= common:
            return (
                f"a row or a column is off by {self.common:.3g} steps as a whole, "
                f"{common:g} at most are due (a wrong factor?)"
            )
        if self._digest.text != digest:
            return "not the weights that the calibration has rounded"
        return None


def _common(crossed: torch.Tensor, squares: torch.Tensor, axis: int) -> torch.Tensor:
    """What errors have in common along an axis, in steps: see ``_MovedTensor.common``."""
    return crossed.sum(axis).abs() / (squares.sum(axis) * crossed.shape[axis]).clamp(min=_TINY).sqrt()


def check_weights(
    exported: ExportedWeights,
    model: PreTrainedModel,
    limit_steps: float,
    advance: Any = None,
    moved: MovedWeights | None = None,
    *,
    exact: bool = False,
) -> WeightCheck:
    """Compare every stored weight with the checkpoint, tensor by tensor.

    Where ``exact``, the codes are the checkpoint's own: no linear weight may differ, but for scales that are
    stored in a coarser type.

    A quantised weight may be off by ``limit_steps`` rounding steps of its block. The step comes from
    the checkpoint's values, not from the stored scale, so that a wrong scale cannot excuse itself;
    it is longer by what the scale's own type may round (2^-8 in bfloat16, nothing in float32).
    A weight that is not quantised must be the checkpoint's, cast. Tensors that a calibration ``moved``
    must be to the last bit what their rounding had recorded, and near the checkpoint's on average.
    """
    checkpoint = CheckpointWeights(model)
    codes = {name for name, each in computed_of(model).items() if each.kept is not None}
    worst, worst_tensor, values, faults = 0.0, None, 0, []
    names, moved_steps, common_steps = list(exported), [0.0], [0.0]
    for name in names:
        tensor, fault = checkpoint[name], None
        rounding, movement = exported.rounding_of(name), None
        if moved is not None and name in moved.digests and rounding is not None:
            movement = _MovedTensor(moved.finer(name, rounding))
        rows = max(1, PIECE // max(1, tensor[0].numel()))
        for start in range(0, tensor.shape[0], rows):
            true = exported.folding.apply(name, tensor[start : start + rows], start)
            stored = exported.stored_rows(name, slice(start, start + rows))
            if rounding is not None and exact and (name not in VOCABULARY or name in codes):
                fault = fault or _code_fault(true.float(), stored, exported.code_rounding(name), start)
                continue
            if rounding is None:
                if name not in exported.recovered:  # such a norm is checked by the matrices that follow it
                    fault = fault or _cast_fault(true, stored, exported.dtype_of(name), start)
                continue
            if movement is not None:
                movement.add(true.float(), stored, rounding)
                continue
            steps = error_in_steps(true.float(), stored, rounding) / (1 + exported.scale_rounding(name))
            largest = float(steps.max())  # NaN if there is one
            if not largest <= worst and not math.isnan(worst):
                worst, worst_tensor = largest, name
            if not largest <= limit_steps:
                fault = fault or _rounding_fault(steps, rounding, start, limit_steps)
        if movement is not None and moved is not None:
            fault = movement.fault(moved.digests[name], moved)
            moved_steps.append(movement.steps)
            common_steps.append(movement.common)
        if fault:
            faults.append(WeightFault(name, fault))
        values += tensor.numel()
        checkpoint.release(name)
        if advance is not None:
            advance(tensor.numel())
    faults += _rope_faults(exported, model)
    return WeightCheck(
        len(names),
        values,
        worst,
        worst_tensor,
        tuple(faults),
        len(moved_steps) - 1,
        max(moved_steps),
        max(common_steps),
    )


def _step_of_each(true: torch.Tensor, fmt: Rounding) -> torch.Tensor:
    """The step of each weight's block, of the shape of ``true``."""
    import torch

    rows, columns = true.shape
    blocks = torch.nn.functional.pad(true, (0, -columns % fmt.block_size)).view(rows, -1, fmt.block_size)
    steps = fmt.step(*torch.aminmax(blocks, dim=-1)).clamp(min=torch.finfo(torch.float32).tiny)
    return steps.repeat_interleave(fmt.block_size, 1)[:, :columns]


def error_in_steps(true: torch.Tensor, stored: torch.Tensor, fmt: Rounding) -> torch.Tensor:
    """Largest error in each block ``[rows, blocks]``, in the steps that are due to the true values.

    NaN and Inf stay what they are.
    """
    import torch

    rows, columns = true.shape
    padding = -columns % fmt.block_size
    error, true = (
        torch.nn.functional.pad(values, (0, padding)).view(rows, -1, fmt.block_size)
        for values in ((stored - true).abs(), true)
    )
    steps = fmt.step(*torch.aminmax(true, dim=-1))
    # A block of zeros has no step, and must come back as zeros.
    return error.amax(-1) / steps.clamp(min=torch.finfo(torch.float32).tiny)


def _rounding_fault(steps: torch.Tensor, fmt: Rounding, start: int, limit: float) -> str:
    bad = ~(steps <= limit)
    row, block = divmod(int(bad.flatten().nonzero()[0]), steps.shape[1])
    more = f" ({int(bad.sum())} blocks of these rows)" if int(bad.sum()) > 1 else ""
    return (
        f"row {start + row}, columns from {block * fmt.block_size}: off by {float(steps[row, block]):.3g} "
        f"rounding steps, {limit:g} at most are due to rounding{more}"
    )


def _cast_fault(true: torch.Tensor, stored: torch.Tensor, dtype: str, start: int) -> str | None:
    import torch

    due = true.to(getattr(torch, dtype)).float()
    if torch.equal(due, stored):
        return None
    row = int((due != stored).reshape(due.shape[0], -1).any(-1).nonzero()[0])
    return f"row {start + row}: not the checkpoint's values in {dtype}"


def _code_fault(true: torch.Tensor, stored: torch.Tensor, scale_rounding: float, start: int) -> str | None:
    """Codes are the checkpoint's where values are, since both multiply them with the same scale."""
    wrong = ~((stored - true).abs() <= scale_rounding * true.abs())
    if not bool(wrong.any()):
        return None
    row, column = divmod(int(wrong.flatten().nonzero()[0]), true.shape[1])
    return (
        f"row {start + row}, column {column}: {float(stored[row, column]):.6g}, the checkpoint's own codes "
        f"give {float(true[row, column]):.6g} ({int(wrong.sum())} values of these rows)"
    )


def _rope_faults(exported: ExportedWeights, model: PreTrainedModel) -> list[WeightFault]:
    faults = []
    for name, due in zip(
        ("cos_cache", "sin_cache"), rope_tables(model.config, len(exported.array("cos_cache")))
    ):
        table = exported.array(name)
        error = np.abs(table.astype(np.float32) - due).max(axis=1)
        tolerance = _ROPE_TOLERANCE[str(table.dtype)] + _ROPE_TOLERANCE_PER_POSITION * np.arange(len(table))
        if len(bad := np.flatnonzero(~(error <= tolerance))):
            faults.append(
                WeightFault(name, f"position {bad[0]}: off by {error[bad[0]]:.3g} (RoPE base or scaling)")
            )
    return faults
