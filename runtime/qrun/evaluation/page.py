"""The report of an evaluation as one HTML page without any other file: on a phone, in light and in dark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from qrun.evaluation.asking import Result
from qrun.evaluation.charts import Bar, Range, bars, ranges
from qrun.evaluation.report import Report
from qrun.evaluation.summary import Measure
from qrun.evaluation.tasks import Task
from qrun.evaluation.wording import bounds_of, change_of, is_beyond_chance, lines_of, short, value_of

STYLE = """
:root { --ink: #1c2024; --soft: #60646c; --paper: #fcfcfd; --line: #e0e1e6;
  --ours: #d9480f; --peer: #7ba3c9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #edeef0; --soft: #b0b4ba; --paper: #111113; --line: #34373c;
    --ours: #ff8a4c; --peer: #4a7299; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 16px; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; border-top: 1px solid var(--line); padding-top: 1.2rem; }
p, li { max-width: 46rem; } .soft { color: var(--soft); font-size: .9rem; }
.charts { display: grid; gap: 20px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); }
figure { margin: 0; } figcaption { font-weight: 600; font-size: .95rem; margin-bottom: 4px; }
svg { width: 100%; max-width: 560px; height: auto; display: block; font: 12px system-ui, sans-serif; }
svg text { fill: var(--ink); } svg .label { text-anchor: end; } svg .ours { font-weight: 600; }
svg rect.ours, svg circle.ours { fill: var(--ours); } svg rect.peer, svg circle.peer { fill: var(--peer); }
svg text.ours { fill: var(--ours); } svg .note, svg .tick { fill: var(--soft); font-size: 11px; }
svg .spread { stroke: var(--ink); stroke-width: 1.5; opacity: .6; } svg .middle { text-anchor: middle; }
svg .over { paint-order: stroke; stroke: var(--paper); stroke-width: 5px; }
svg .end { text-anchor: end; } svg .axis { stroke: var(--soft); fill: none; } svg .point { font-size: 11px; }
svg .grid { stroke: var(--line); fill: none; } svg .leader { stroke: var(--soft); opacity: .5; fill: none; }
.wide { overflow-x: auto; margin: .8rem 0; -webkit-overflow-scrolling: touch; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 10px 4px 0; text-align: right; vertical-align: top; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; white-space: normal; vertical-align: bottom; min-width: 4.2rem; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
td.words { text-align: left; white-space: normal; min-width: 16rem; } tr.ours td { color: var(--ours); }
tr.changed td { color: var(--ours); } td.text { text-align: left; white-space: pre-wrap; min-width: 9rem;
  max-width: 26rem; overflow-wrap: anywhere; }
details { margin: .6rem 0; } summary { cursor: pointer; font-weight: 600; }
"""


_LABEL = 24  # letters of a folder's name beside a bar
_SHOWN = 400  # letters of a prompt or an answer
_COLUMNS = ("folder", "value", "95 % interval", "difference", "lines")
_EXPLANATION = (
    "Differences are those from the first folder, on the same lines: in points of percent for shares, in "
    "percent for perplexities. The interval comes from drawing the lines anew 10,000 times; where it holds "
    "no zero, it is coloured. Where no line changed, the largest share of such lines that may still change "
    "is told. "
    "Intervals say what other lines of the same kind may give, not what other kinds of work do."
)


def document(title: str, parts: Iterable[str]) -> str:
    """A whole page of parts of HTML; ``title`` is text."""
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body>\n{body}\n</body></html>\n"
    )


def page(report: Report) -> str:
    """The whole page as text."""
    labels = report.labels
    title = f"{labels[0]} on {report.facts['data']}"
    parts = [f"<h1>{escape(title)}</h1>"]
    parts += [f'<p class="soft">{escape(line)}</p>' for line in conditions(report)]
    parts.append(f'<div class="charts">{"".join(_charts(report.measures))}</div>')
    parts.append("<h2>Figures</h2>")
    parts += [_figures(each) for each in report.measures]
    parts.append(f'<p class="soft">{escape(_EXPLANATION)}</p>')
    if len(labels) > 1:
        parts.append("<h2>Lines that changed</h2>")
        if changed := report.changed:
            parts.append(_lines(report, changed))
        else:
            parts.append("<p>None is right in one folder and wrong in another.</p>")
    parts.append("<h2>All lines</h2>")
    everything = _lines(report, range(len(report.tasks)))
    parts.append(f"<details><summary>{len(report.tasks):,} lines</summary>{everything}</details>")
    return document(title, parts)


def conditions(report: Report) -> list[str]:
    """What the figures depend on, in a few lines."""
    facts = report.facts
    asked = "turns of a chat" if facts["chat"] else "texts that are continued"
    found = [
        f"{facts['lines']:,} lines, sha256 {facts['sha256'][:12]}; prompts are {asked}, answers greedy, of "
        f"at most {facts['max_tokens']} tokens; seed {facts['seed']}; {facts['date']}"
    ]
    for each in report.folders:
        found.append(
            f"{each['label']}: {each['precision']}, {each['bytes'] / 1e6:,.1f} MB, {each['device']}, "
            f"{each['seconds']:,.1f} s"
        )
    return found


def _charts(measures: Sequence[Measure]) -> list[str]:
    found = []
    for measure in (each for each in measures if each.group is None):
        values = [
            Bar(
                short(each.folder, _LABEL),
                each.value.value,
                value_of(measure, each),
                each.value.low,
                each.value.high,
                not index,
            )
            for index, each in enumerate(measure.figures)
        ]
        found.append(
            bars(f"{measure.title}, {measure.lines:,} lines", values, 1.0 if measure.is_share else None)
        )
        changes = [
            Range(
                short(each.folder, _LABEL),
                interval.value,
                interval.low,
                interval.high,
                change_of(measure, change),
            )
            for each in measure.figures
            if (change := each.change) is not None
            for interval in [change.difference]
        ]
        if changes:
            unit = "points" if measure.is_share else "%"
            first = short(measure.figures[0].folder, _LABEL)
            found.append(ranges(f"{measure.name}: difference from {first}, {unit}", changes))
    return found


def _figures(measure: Measure) -> str:
    rows = []
    for each in measure.figures:
        change = each.change
        cells = [each.folder, value_of(measure, each), bounds_of(measure, each)]
        cells += ["" if change is None else change_of(measure, change), lines_of(measure, change)]
        seen = change is not None and is_beyond_chance(change.difference)
        body = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        rows.append(f"<tr{' class=changed' if seen else ''}>{body}</tr>")
    return f"<h3>{escape(measure.title)}, {measure.lines:,} lines</h3>{_table(_COLUMNS, rows)}"


def _lines(report: Report, places: Iterable[int]) -> str:
    rows = []
    for place in places:
        task = report.tasks[place]
        cells = [f"<td>{escape(task.name)}</td>", _text(task.asked), _text(" / ".join(task.expected))]
        cells += [_answer(task, each[place]) for each in report.results]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return _table(["line", "asked", "expected", *report.labels], rows)


def _answer(task: Task, result: Result) -> str:
    if task.kind == "perplexity":
        return _text(f"{result.nats / result.tokens:.3f} nats a token, {result.tokens:,} tokens")
    mark = "right" if result.right else "wrong"
    return _text(f"{mark}: {result.answer}")


def _text(text: str) -> str:
    shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    return f'<td class="text">{escape(shown)}</td>'


def _table(header: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )
