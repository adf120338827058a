"""How many prompts to answer at once: as many as memory has room for and the machine gains by."""

from __future__ import annotations

from dataclasses import dataclass

from qrun.decoding.step_time import step_seconds
from qrun.errors import QrunError
from qrun.folder.manifest import forecast_bytes
from qrun.machine import available_memory, give_back_memory
from qrun.model import Model

MOST_ROWS = 128
# Twice as many rows must gain so much, since each of them takes memory, and the end of a batch runs on few.
_WORTH = 1.05
# Of the memory that is free: the rest is left to activations and to other programs.
_SHARE = 0.6


@dataclass(frozen=True)
class Rows:
    """How many prompts are answered at once, and why.

    Attributes:
        count: of them.
        why: for people.
    """

    count: int
    why: str


def choose_rows(model: Model, *, lines: int, tokens: int, reserved: int = 0) -> Rows:
    """As many rows as give the most tokens a second.

    Rows are doubled until that has twice not gained 5 percent, measured by some steps: a processor may gain
    nothing from 4 to 8 rows and much from 8 to 16.

    Args:
        model: nobody else may use its session meanwhile.
        lines: of the batch; more rows than that would be idle.
        tokens: of the longest prompt with its answer, about.
        reserved: bytes of memory that something else will take.

    Raises:
        QrunError: not even one row fits into memory.
    """
    try:
        return _measured(model, lines, tokens, reserved)
    finally:
        give_back_memory()  # of the caches that were measured with


def _measured(model: Model, lines: int, tokens: int, reserved: int) -> Rows:
    manifest = model.manifest
    if manifest.target != "onnxruntime":
        return Rows(1, "a plan answers one prompt at a time")
    most = min(MOST_ROWS, max(1, lines))
    there = "there is 1 line" if lines == 1 else f"there are {lines:,} lines"
    why = there if lines < MOST_ROWS else f"the most are {MOST_ROWS}"
    free = available_memory()
    if free is not None:
        row = forecast_bytes(manifest, min(tokens, manifest.model.context_length))
        fit = int(max(0, free - reserved) * _SHARE) // max(1, row)
        if fit < most:
            most, why = max(1, fit), f"memory has room for {max(1, fit)} of {tokens:,} tokens"
    best, rate, missed, bound = 1, 0.0, 0, why
    rows = 1
    while rows <= most:
        try:
            found = rows / step_seconds(model.session, rows)
        except QrunError:
            if rows == 1:
                raise
            return Rows(best, f"memory has room for {best}")
        if found >= _WORTH * rate:
            best, rate, missed, why = rows, found, 0, bound
        else:
            missed += 1
            why = f"{rows} would give {found:.0f} tokens/s instead of {rate:.0f}"
        if missed == 2:
            break
        rows = most if rows < most < 2 * rows else 2 * rows
    return Rows(best, why)
