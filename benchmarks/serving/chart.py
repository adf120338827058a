"""Lines over numbers of clients, as SVG text: it follows the page's colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 560, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 400, 34, 276
_STYLE = """
svg { font: 12px system-ui, sans-serif; background: #fcfcfd; } text { fill: #1c2024; }
.title { font-weight: 600; font-size: 14px; } .soft { fill: #60646c; font-size: 11px; }
.grid { stroke: #e0e1e6; } .ours { stroke: #d9480f; fill: #d9480f; }
.peer0 { stroke: #2f6690; fill: #2f6690; }
.peer1 { stroke: #5b8c5a; fill: #5b8c5a; } .peer2 { stroke: #8a6fb0; fill: #8a6fb0; }
.peer3 { stroke: #8d8d8d; fill: #8d8d8d; } path { fill: none !important; stroke-width: 2; }
text.ours, text.peer0, text.peer1, text.peer2, text.peer3 { stroke: none; }
@media (prefers-color-scheme: dark) { svg { background: #111113; } text { fill: #edeef0; }
  .soft { fill: #b0b4ba; } .grid { stroke: #34373c; } .ours { stroke: #ff8a4c; fill: #ff8a4c; }
  .peer0 { stroke: #7ba3c9; fill: #7ba3c9; } .peer1 { stroke: #8fbf8e; fill: #8fbf8e; }
  .peer2 { stroke: #b9a3da; fill: #b9a3da; } }
"""


@dataclass(frozen=True)
class Line:
    """One server: values over numbers of clients, with the least and the greatest of all rounds."""

    label: str
    points: Sequence[tuple[int, float, float, float]]
    ours: bool = False


def lines(title: str, unit: str, found: Sequence[Line]) -> str:
    """A chart; both axes are linear and begin at zero."""
    most_x = max(point[0] for line in found for point in line.points)
    step = _step(max(point[3] for line in found for point in line.points))
    most_y = step * (1 + int(max(point[3] for line in found for point in line.points) / step))

    def x(value: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * value / most_x

    def y(value: float) -> float:
        return _BOTTOM - (_BOTTOM - _TOP) * value / most_y

    def text(kind: str, place: tuple[float, float], words: str, anchor: str = "start") -> str:
        return (
            f'<text class="{kind}" text-anchor="{anchor}" x="{place[0]:.1f}" y="{place[1]:.1f}">'
            f"{escape(words)}</text>"
        )

    def stroke(kind: str, first: tuple[float, float], last: tuple[float, float]) -> str:
        return (
            f'<line class="{kind}" x1="{first[0]:.1f}" y1="{first[1]:.1f}" '
            f'x2="{last[0]:.1f}" y2="{last[1]:.1f}"/>'
        )

    parts = [text("title", (8, 18), title), text("soft", (_LEFT, _TOP - 4), unit)]
    for count in range(round(most_y / step) + 1):
        height = y(count * step)
        parts.append(stroke("grid", (_LEFT, height), (_RIGHT, height)))
        parts.append(text("soft", (_LEFT - 6, height + 4), f"{count * step:g}", "end"))
    for value in sorted({point[0] for line in found for point in line.points}):
        parts.append(text("soft", (x(value), _BOTTOM + 16), str(value), "middle"))
    parts.append(text("soft", ((_LEFT + _RIGHT) / 2, _BOTTOM + 34), "clients at once", "middle"))
    peers = [line for line in found if not line.ours]
    ends = _apart([y(line.points[-1][1]) for line in found])
    for line, end in zip(found, ends):
        kind = "ours" if line.ours else f"peer{peers.index(line) % 4}"
        path = "L".join(f"{x(count):.1f} {y(value):.1f}" for count, value, _, _ in line.points)
        parts.append(f'<path class="{kind}" d="M{path}"/>')
        for count, value, least, greatest in line.points:
            parts.append(stroke(kind, (x(count), y(least)), (x(count), y(greatest))))
            parts.append(f'<circle class="{kind}" cx="{x(count):.1f}" cy="{y(value):.1f}" r="3.5"/>')
        parts.append(text(kind, (_RIGHT + 10, end + 4), line.label))
    drawing = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(title)}"><style>{_STYLE}</style>\n{drawing}\n</svg>\n'
    )


def _step(most: float) -> float:
    """A round distance of grid lines, of which there are three to eight."""
    size = 10.0 ** len(str(int(most * 1000))) / 1000
    return next(size / part for part in (2, 5, 10, 20, 50, 100) if most / (size / part) >= 3)


def _apart(heights: list[float]) -> list[float]:
    """Places of labels that do not overlap, near the wanted ones."""
    order, found, last = sorted(range(len(heights)), key=heights.__getitem__), list(heights), -99.0
    for index in order:
        found[index] = last = max(heights[index], last + 14)
    return found
