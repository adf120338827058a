"""The report as one HTML page without any other file: readable on a phone, in light and in dark mode."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from benchmarks.compare.charts import Bar, Point, bars, scatter
from benchmarks.compare.figures import (
    BEHIND_HEADER,
    BEST_HEADER,
    CONVERSION_HEADER,
    EXPLANATION,
    SPEED_HEADER,
    Report,
    behind_table,
    conditions_lines,
    conversion_table,
    gigabytes,
    number,
    quality_table,
    speed_table,
    version_table,
)
from benchmarks.compare.peers import Contender
from benchmarks.compare.summary import Row

_STYLE = """
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
svg .end { text-anchor: end; } svg .axis { stroke: var(--soft); fill: none; } svg .point { font-size: 11px; }
svg .grid { stroke: var(--line); fill: none; } svg .leader { stroke: var(--soft); opacity: .5; fill: none; }
.wide { overflow-x: auto; margin: .8rem 0; -webkit-overflow-scrolling: touch; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 10px 4px 0; text-align: right; vertical-align: top; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; white-space: normal; vertical-align: bottom; min-width: 4.2rem; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
td.words { text-align: left; white-space: normal; min-width: 16rem; } tr.ours td { color: var(--ours); }
details { margin: .6rem 0; } summary { cursor: pointer; font-weight: 600; }
"""


def page(report: Report, chosen: Sequence[Contender]) -> str:
    """The whole page as text."""
    parts = ["<h1>qconvert beside other engines</h1>"]
    parts += [f'<p class="soft">{escape(line)}</p>' for line in conditions_lines(report)]
    for shape in report.facts["shapes"]:
        parts += _shape(report, shape)
    parts.append("<h2>Where we are not ahead</h2>")
    behind = behind_table(report.behind())
    if behind:
        parts.append(
            "<p>Each of our variants against every peer with at least as many bits, worst first.</p>"
        )
        parts.append(_table(BEHIND_HEADER, behind))
    else:
        parts.append("<p>Nowhere in this run.</p>")
    if report.quality:
        parts += _quality(report)
    parts.append("<h2>All figures</h2>")
    parts.append(f'<p class="soft">{escape(EXPLANATION)}</p>')
    for (shape, prompt), all_rows in report.rows.items():
        if prompt != report.headline:
            title = f"Qwen2.5 {shape.upper()} shape, prompt of {prompt} tokens"
            parts.append(_details(title, _table(SPEED_HEADER, speed_table(all_rows))))
    for shape, records in report.conversions.items():
        parts.append(
            _details(f"Conversion, {shape}", _table(CONVERSION_HEADER, conversion_table(chosen, records)))
        )
    parts.append(_details("Versions", _table(["engine", "versions"], version_table(report), words=True)))
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>qconvert beside other engines</title><style>{_STYLE}</style></head>"
        f"<body>\n{body}\n</body></html>\n"
    )


def _shape(report: Report, shape: str) -> list[str]:
    all_rows = report.headline_rows(shape)
    charts = [
        bars("Prompt, tokens/s (longer is better)", _bars(all_rows, "prompt")),
        bars("Decode, tokens/s (longer is better)", _bars(all_rows, "decode")),
        bars("Peak memory, GB (shorter is better)", _bars(all_rows, "memory", 1e9)),
        bars("Load, s (shorter is better)", _bars(all_rows, "load")),
    ]
    parts = [f"<h2>Qwen2.5 {escape(shape.upper())} shape, prompt of {report.headline} tokens</h2>"]
    parts.append(f'<div class="charts">{"".join(charts)}</div>')
    best = report.against_best(shape)
    if best:
        parts.append(_table(BEST_HEADER, best))
    parts.append(_table(SPEED_HEADER, speed_table(all_rows)))
    return parts


def _bars(all_rows: Sequence[Row], measure: str, unit: float = 1.0) -> list[Bar]:
    found = []
    for row in all_rows:
        label = row.contender.short
        values = [value / unit for value in row.rounds.get(measure, {}).values()]
        middle = row.median(measure)
        if middle is None:
            found.append(Bar(label, None, ours=row.contender.ours, note="failed" if row.failed else "–"))
            continue
        text = gigabytes(middle) if unit == 1e9 else number(middle)
        found.append(Bar(label, middle / unit, text, min(values), max(values), row.contender.ours))
    return found


def _quality(report: Report) -> list[str]:
    parts = ["<h2>Quality: a real 135M model, against PyTorch in float32</h2>"]
    # What is not quantised lies so far below that the others would lie on one line.
    known = [entry for entry in report.quality if entry.by_text and entry.contender.bits <= 8]
    by_bytes = [
        Point(e.contender.short, (e.model_bytes or 0) / 1e6, e.mean("mean_kl") or 0, e.contender.ours)
        for e in known
    ]
    charts = [scatter("Quality against bytes (lower left is better)", by_bytes, "MB", "mean KL, nats")]
    for shape in report.facts["shapes"]:
        speeds = {row.contender.name: row.median("decode") or 0 for row in report.headline_rows(shape)}
        by_speed = [
            Point(
                e.contender.short, speeds.get(e.contender.name, 0), e.mean("mean_kl") or 0, e.contender.ours
            )
            for e in known
        ]
        title = f"Quality against decode speed of {shape.upper()} (lower right is better)"
        charts.append(scatter(title, by_speed, "decode, tokens/s", "mean KL, nats"))
    parts.append(f'<div class="charts">{"".join(charts)}</div>')
    parts.append(_table(*quality_table(report.quality)))
    return parts


def _details(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def _table(header: Sequence[str], lines: Sequence[Sequence[str]], *, words: bool = False) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = []
    for line in lines:
        ours = line[0].startswith("**")
        cells = []
        for index, cell in enumerate(line):
            failed = cell.startswith("failed:")
            kind = ' class="words"' if (words and index) or failed else ""
            span = f' colspan="{len(line) - index}"' if failed else ""
            cells.append(f"<td{kind}{span}>{_inline(cell)}</td>")
            if failed:
                break
        body.append(f"<tr{' class=ours' if ours else ''}>{''.join(cells)}</tr>")
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
    )


def _inline(text: str) -> str:
    return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", escape(text))
