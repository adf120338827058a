"""The report as one HTML page without any other file: readable on a phone, in light and in dark mode."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from benchmarks.compare.charts import Point, scatter
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
from benchmarks.compare.together import GUESSES_NOTE, ROWS_NOTE
from benchmarks.shapes import title_of
from qrun.evaluation.charts import Bar, bars
from qrun.evaluation.page import document


def page(report: Report, chosen: Sequence[Contender]) -> str:
    """The whole page as text."""
    parts = ["<h1>qconvert beside other engines</h1>"]
    parts += [f'<p class="soft">{escape(line)}</p>' for line in conditions_lines(report)]
    for shape in report.facts["shapes"]:
        parts += _shape(report, shape)
    guesses = report.guesses()
    if guesses:
        parts.append("<h2>Several tokens a step, where text repeats itself</h2>")
        parts += [f'<p class="soft">{escape(GUESSES_NOTE)}</p>', _table(*guesses)]
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
            title = f"{title_of(shape)} shape, prompt of {prompt} tokens"
            parts.append(_details(title, _table(SPEED_HEADER, speed_table(all_rows))))
    for shape, records in report.conversions.items():
        parts.append(
            _details(f"Conversion, {shape}", _table(CONVERSION_HEADER, conversion_table(chosen, records)))
        )
    parts.append(_details("Versions", _table(["engine", "versions"], version_table(report), words=True)))
    return document("qconvert beside other engines", parts)


def _shape(report: Report, shape: str) -> list[str]:
    all_rows = report.headline_rows(shape)
    charts = [
        bars("Prompt, tokens/s (longer is better)", _bars(all_rows, "prompt")),
        bars("Decode, tokens/s (longer is better)", _bars(all_rows, "decode")),
        bars("Peak memory, GB (shorter is better)", _bars(all_rows, "memory", 1e9)),
        bars("Load, s (shorter is better)", _bars(all_rows, "load")),
    ]
    parts = [f"<h2>{escape(title_of(shape))} shape, prompt of {report.headline} tokens</h2>"]
    parts.append(f'<div class="charts">{"".join(charts)}</div>')
    best = report.against_best(shape)
    if best:
        parts.append(_table(BEST_HEADER, best))
    parts.append(_table(SPEED_HEADER, speed_table(all_rows)))
    together = report.together(shape)
    if together:
        note = escape(ROWS_NOTE.format(prompt=report.facts["rows_prompt"]))
        parts += ["<h3>Several answers at once</h3>", f'<p class="soft">{note}</p>', _table(*together)]
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
