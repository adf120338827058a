"""The results of ``qrun eval`` in a terminal, within 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from qrun.cli.terminal import WIDTH
from qrun.evaluation.page import conditions
from qrun.evaluation.report import Report
from qrun.evaluation.summary import Measure
from qrun.evaluation.wording import bounds_of, change_of, is_beyond_chance, lines_of, short, value_of

_LABEL = 24
_VALUE = 26


def as_lines(report: Report) -> Iterator[str]:
    """A block for each measure: a line for each folder, and one for what it changes."""
    for measure in report.measures:
        yield from _measure(measure)
        yield ""
    if len(report.labels) > 1:
        first = short(report.labels[0], 40)
        note = (
            f"Differences are from {first} on the same lines, with 95 % intervals: points of percent for "
            "shares, percent for perplexities; * where the interval holds no zero."
        )
        yield from textwrap.wrap(note, WIDTH)
        yield ""
    for line in conditions(report):
        yield from textwrap.wrap(line, WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def _measure(measure: Measure) -> Iterator[str]:
    count = f"{measure.lines:,} lines" if measure.lines > 1 else "1 line"
    yield f"{short(measure.title, WIDTH - len(count) - 2)}, {count}"
    for each in measure.figures:
        value = f"{value_of(measure, each)} ({bounds_of(measure, each)})"
        line = f"  {short(each.folder, _LABEL):<{_LABEL}} {value:<{_VALUE}}"
        if each.change is None:
            yield line.rstrip()
            continue
        seen = " *" if is_beyond_chance(each.change.difference) else ""
        change = f"{change_of(measure, each.change)}{seen}"
        words = lines_of(measure, each.change)
        if len(line) + len(change) > WIDTH:
            yield line.rstrip()
            yield f"  {'':<{_LABEL}} {', '.join(filter(None, (change, words)))}"
            continue
        yield line + change
        if words:
            yield f"  {'':<{_LABEL}} {'':<{_VALUE}}{words}".rstrip()
