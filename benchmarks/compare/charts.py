"""Scatter plots as SVG text, beside the bars of ``qrun.evaluation.charts``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from qrun.evaluation.charts import WIDTH, figure


@dataclass(frozen=True)
class Point:
    label: str
    x: float
    y: float
    ours: bool = False


def scatter(title: str, points: Sequence[Point], x_title: str, y_title: str) -> str:
    """Points on two logarithmic axes, each with its label; labels that would overlap give way vertically."""
    left, right, top, bottom = 56, WIDTH - 12, 10, 270
    points = [point for point in points if point.x > 0 and point.y > 0]
    if not points:
        return ""
    x_scale = _log_scale([point.x for point in points], left + 14, right - 20)
    y_scale = _log_scale([point.y for point in points], bottom - 14, top + 14)
    parts = [f'<path class="axis" d="M{left} {top}V{bottom}H{right}"/>']
    for value, place in x_scale.ticks:
        parts.append(f'<path class="grid" d="M{place:.1f} {top}V{bottom}"/>')
        parts.append(f'<text class="tick middle" x="{place:.1f}" y="{bottom + 15}">{value}</text>')
    for value, place in y_scale.ticks:
        parts.append(f'<path class="grid" d="M{left} {place:.1f}H{right}"/>')
        parts.append(f'<text class="tick end" x="{left - 4}" y="{place + 4:.1f}">{value}</text>')
    parts.append(
        f'<text class="tick middle" x="{(left + right) / 2}" y="{bottom + 32}">{escape(x_title)}</text>'
    )
    parts.append(
        f'<text class="tick middle" transform="translate(10 {(top + bottom) / 2}) rotate(-90)">'
        f"{escape(y_title)}</text>"
    )
    placed = [(x_scale.place(point.x), y_scale.place(point.y)) for point in points]
    taken = [(x - 6, y + 4, 12.0) for x, y in placed]  # no label on another's point
    for point, (x, y) in sorted(zip(points, placed), key=lambda pair: not pair[0].ours):
        kind = "ours" if point.ours else "peer"
        width = 6.2 * len(point.label)
        before = x + 8 + width > right
        start = x - 8 - width if before else x + 8
        place = _free_place(start, y + 4, width, taken, (top + 8, bottom - 4))
        parts.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="5"/>')
        if abs(place - y - 4) > 8:
            edge = start + width if before else start
            parts.append(f'<path class="leader" d="M{x:.1f} {y:.1f}L{edge:.1f} {place - 4:.1f}"/>')
        anchor = "end" if before else "start"
        anchor_x = start + width if before else start
        parts.append(
            f'<text class="point {kind} {anchor}" x="{anchor_x:.1f}" y="{place:.1f}">'
            f"{escape(point.label)}</text>"
        )
    return figure(title, bottom + 40, parts)


def _free_place(
    start: float,
    wanted: float,
    width: float,
    taken: list[tuple[float, float, float]],
    limits: tuple[float, float],
) -> float:
    """The height nearest to the wanted one at which no other label is in the way; it is then taken."""
    for step in range(60):
        offset = (step + 1) // 2 * 4 * (-1 if step % 2 else 1)
        place = wanted + offset
        clear = all(
            abs(place - height) >= 13 or start > other + other_width or other > start + width
            for other, height, other_width in taken
        )
        if clear and limits[0] <= place <= limits[1]:
            break
    else:
        place = wanted
    taken.append((start, place, width))
    return place


class _log_scale:  # noqa: N801 (used as a function)
    """Maps values to places, and finds round values for the ticks."""

    def __init__(self, values: Sequence[float], first: float, last: float) -> None:
        self.low, self.high = math.log10(min(values)), math.log10(max(values))
        if self.high - self.low < 0.3:
            middle = (self.high + self.low) / 2
            self.low, self.high = middle - 0.15, middle + 0.15
        self.first, self.last = first, last
        span = self.high - self.low
        steps = (1, 1.5, 2, 3, 5, 7) if span < 0.8 else (1, 2, 5) if span < 2.2 else (1,)
        exponents = range(math.floor(self.low) - 1, math.ceil(self.high) + 1)
        ticks = [step * 10.0**exponent for exponent in exponents for step in steps]
        self.ticks = [(f"{tick:g}", self.place(tick)) for tick in ticks if self._inside(tick)]

    def _inside(self, value: float) -> bool:
        return self.low - 0.03 <= math.log10(value) <= self.high + 0.03

    def place(self, value: float) -> float:
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return self.first + share * (self.last - self.first)
