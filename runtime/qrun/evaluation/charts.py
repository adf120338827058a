"""Charts as SVG text, for benchmarks/ too: they scale to a phone and follow the page's colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 400
_BAR = 22


@dataclass(frozen=True)
class Bar:
    """``least`` and ``greatest`` draw the spread; without a value the bar says ``note``."""

    label: str
    value: float | None
    text: str = ""
    least: float | None = None
    greatest: float | None = None
    ours: bool = False
    note: str = "failed"


def bars(title: str, values: Sequence[Bar], most: float | None = None) -> str:
    """Horizontal bars, the order as given; ``most`` fills the width, by default the longest value."""
    top = most or max((bar.greatest or bar.value or 0 for bar in values), default=0) or 1
    # Ours is in bold type.
    left = 16 + max((len(bar.label) * (7.6 if bar.ours else 6.4) for bar in values), default=0)
    room = WIDTH - left - 58
    height = len(values) * _BAR + 6
    parts = []
    for index, bar in enumerate(values):
        y = index * _BAR + 4
        kind = "ours" if bar.ours else "peer"
        parts.append(f'<text class="label {kind}" x="{left - 6:.1f}" y="{y + 12}">{escape(bar.label)}</text>')
        if bar.value is None:
            parts.append(f'<text class="note" x="{left:.1f}" y="{y + 12}">{escape(bar.note)}</text>')
            continue
        length = room * bar.value / top
        end = length
        parts.append(f'<rect class="{kind}" x="{left:.1f}" y="{y}" width="{length:.1f}" height="15" rx="2"/>')
        if bar.least is not None and bar.greatest is not None and bar.greatest > bar.least:
            low, end = room * bar.least / top, max(length, room * bar.greatest / top)
            x1, x2 = left + low, left + room * bar.greatest / top
            parts.append(f'<line class="spread" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y + 7.5}" y2="{y + 7.5}"/>')
        parts.append(f'<text class="value" x="{left + end + 4:.1f}" y="{y + 12}">{escape(bar.text)}</text>')
    return figure(title, height, parts)


@dataclass(frozen=True)
class Range:
    """A difference with its interval."""

    label: str
    value: float
    low: float
    high: float
    text: str = ""


def ranges(title: str, values: Sequence[Range]) -> str:
    """Differences from zero, which is a line: what lies wholly on one side of it is no chance."""
    left = 16 + 6.4 * max((len(each.label) for each in values), default=0)
    right = WIDTH - 8.0
    reach = max((abs(bound) for each in values for bound in (each.low, each.high)), default=0) or 1
    zero, half = (left + right) / 2, (right - left) / 2 - 8
    row = 2 * _BAR - 6
    height = len(values) * row + 4
    parts = [f'<path class="axis" d="M{zero:.1f} 2V{height - 2}"/>']
    for index, each in enumerate(values):
        y = index * row + 14
        x1, x2, x = (zero + half * bound / reach for bound in (each.low, each.high, each.value))
        parts.append(f'<text class="label peer" x="{left - 6:.1f}" y="{y + 4}">{escape(each.label)}</text>')
        parts.append(f'<line class="spread" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y}" y2="{y}"/>')
        parts.append(f'<circle class="peer" cx="{x:.1f}" cy="{y}" r="4.5"/>')
        parts.append(f'<text class="note middle over" x="{zero:.1f}" y="{y + 18}">{escape(each.text)}</text>')
    return figure(title, height, parts)


def figure(title: str, height: float, parts: Sequence[str]) -> str:
    """A drawing of the common width under its title."""
    drawing = "".join(parts)
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        f'aria-label="{escape(title)}">{drawing}</svg></figure>'
    )
