"""Figures as people read them, for the table and the page alike."""

from __future__ import annotations

from qrun.evaluation.report import is_unchanged
from qrun.evaluation.statistics import Interval, most_changed
from qrun.evaluation.summary import Change, Figure, Measure


def value_of(measure: Measure, figure: Figure) -> str:
    """A folder's figure: ``72.5 %`` or ``18.31``."""
    value = figure.value.value
    return f"{100 * value:.1f} %" if measure.is_share else number(value)


def bounds_of(measure: Measure, figure: Figure) -> str:
    """The interval of a folder's figure: ``58 to 84``."""
    low, high = figure.value.low, figure.value.high
    return f"{100 * low:.0f} to {100 * high:.0f}" if measure.is_share else f"{number(low)} to {number(high)}"


def change_of(measure: Measure, change: Change) -> str:
    """A difference with its interval: ``-5.0 (-12.5 to +2.5)``, in points of percent, else in percent."""
    if measure.counts_lines and is_unchanged(change):
        return f"no line changed (at most {100 * most_changed(measure.lines):.0f} % do)"
    unit = "" if measure.is_share else " %"
    each = change.difference
    return f"{_signed(each.value)}{unit} ({_signed(each.low)} to {_signed(each.high)})"


def lines_of(measure: Measure, change: Change | None) -> str:
    """Which lines changed: ``3 lost, 1 won``; empty where nothing is right or wrong."""
    if change is None or not measure.counts_lines or is_unchanged(change):
        return ""
    return f"{change.lost} lost, {change.won} won"


def is_beyond_chance(interval: Interval) -> bool:
    """Whether zero lies outside."""
    return interval.low > 0 or interval.high < 0


def number(value: float) -> str:
    """Three or more digits: 7.31, 18.3, 1,204."""
    return f"{value:,.2f}" if value < 100 else f"{value:,.0f}"


def short(text: str, most: int) -> str:
    """One line of at most so many letters; what is left out in the middle is three dots."""
    text = " ".join(text.split())
    if len(text) <= most:
        return text
    half = (most - 3) // 2
    return f"{text[: most - 3 - half]}...{text[len(text) - half :]}"


def _signed(share: float) -> str:
    text = f"{100 * share:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text
