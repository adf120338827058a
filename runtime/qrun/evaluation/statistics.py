"""How far a figure of some lines can be trusted: intervals for one folder, and for two on the same lines."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RESAMPLES = 10_000
LEVEL = 0.95
_Z = 1.959964  # of the normal distribution, for LEVEL on both sides
_AT_ONCE = 2_000_000  # numbers of one piece of work


@dataclass(frozen=True)
class Interval:
    """An estimate with the bounds between which the true value lies at ``LEVEL``."""

    value: float
    low: float
    high: float


def bootstrap(columns: Floats, statistic: Callable[[Floats], Floats], seed: int) -> Interval:
    """The interval of a statistic of sums over lines, by drawing lines anew, with replacement.

    Lines are drawn whole, so what several folders give for a line stays together: the interval of a
    difference is that of paired samples. The same seed draws the same lines.

    Source: Efron 1979, "Bootstrap Methods: Another Look at the Jackknife"; percentile interval.

    Args:
        columns: ``[lines, k]``, what each line contributes.
        statistic: from sums ``[..., k]`` to values ``[...]``.
        seed: of the draws.
    """
    lines = len(columns)
    draws = np.random.default_rng(seed)
    found = []
    for start in range(0, RESAMPLES, piece := max(1, _AT_ONCE // lines)):
        count = min(piece, RESAMPLES - start)
        taken = draws.integers(lines, size=(count, lines))
        sums = np.stack([column[taken].sum(axis=1) for column in columns.T], axis=-1)
        found.append(statistic(sums))
    low, high = np.quantile(np.concatenate(found), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(statistic(columns.sum(axis=0))), float(low), float(high))


def wilson(right: int, lines: int) -> Interval:
    """The interval of a share.

    It has a width also where all or none are right, where drawing anew would show none.

    Source: Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference".
    """
    share = right / lines
    spread = 1 + _Z**2 / lines
    middle = (share + _Z**2 / (2 * lines)) / spread
    half = _Z * math.sqrt(share * (1 - share) / lines + _Z**2 / (4 * lines**2)) / spread
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))


def most_changed(lines: int) -> float:
    """Where none of so many lines has changed: the largest share of such lines that can still change.

    The share that would leave all unchanged in one of twenty cases; about 3 divided by the lines.
    """
    return float(1 - (1 - LEVEL) ** (1 / lines))
