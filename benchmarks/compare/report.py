"""The report in Markdown, JSON and one HTML page; every sentence of it follows from the data."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.compare.figures import (
    BEHIND_HEADER,
    BEST_HEADER,
    CONVERSION_HEADER,
    EXPLANATION,
    SPEED_HEADER,
    Measured,
    Report,
    behind_table,
    conditions_lines,
    conversion_table,
    quality_table,
    speed_table,
    version_table,
)
from benchmarks.compare.page import page
from benchmarks.compare.peers import Contender
from benchmarks.compare.records import Result
from benchmarks.compare.together import GUESSES_NOTE, ROWS_NOTE
from benchmarks.report import table
from benchmarks.shapes import title_of


def markdown(report: Report, chosen: Sequence[Contender]) -> str:
    parts = ["# qconvert beside other engines", "  \n".join(conditions_lines(report))]
    parts.append(EXPLANATION)
    for shape in report.facts["shapes"]:
        parts.append(f"## {title_of(shape)} shape, prompt of {report.headline}")
        parts.append(table(SPEED_HEADER, speed_table(report.headline_rows(shape))))
        best = report.against_best(shape)
        if best:
            parts.append(table(BEST_HEADER, best))
        together = report.together(shape)
        if together:
            parts.append(f"## {title_of(shape)} shape, several answers at once")
            parts.append(ROWS_NOTE.format(prompt=report.facts["rows_prompt"]))
            parts.append(table(*together))
    guesses = report.guesses()
    if guesses:
        parts += ["## Several tokens a step, where text repeats itself", GUESSES_NOTE, table(*guesses)]
    parts.append("## Where we are not ahead")
    behind = behind_table(report.behind())
    parts.append(table(BEHIND_HEADER, behind) if behind else "Nowhere in this run.")
    if report.quality:
        parts.append("## Quality: sample model (135M), against PyTorch in float32")
        parts.append(table(*quality_table(report.quality)))
    for (shape, prompt), all_rows in report.rows.items():
        if prompt != report.headline:
            parts.append(f"## {title_of(shape)}, prompt of {prompt}")
            parts.append(table(SPEED_HEADER, speed_table(all_rows)))
    for shape, records in report.conversions.items():
        parts.append(f"## Conversion, {shape}")
        parts.append(table(CONVERSION_HEADER, conversion_table(chosen, records)))
    parts.append("## Versions")
    parts.append(table(["engine", "versions"], version_table(report)))
    return "\n\n".join(parts) + "\n"


def write_report(
    out: Path,
    facts: dict[str, Any],
    chosen: Sequence[Contender],
    *,
    conversions: dict[str, dict[str, Result]],
    records: Measured,
) -> list[Path]:
    """Write report.md, report.json, report.html and the raw records into ``out``."""
    report = Report(facts, chosen, conversions=conversions, records=records)
    out.mkdir(parents=True, exist_ok=True)
    raw = {"measurements": list(records.alone), "quality": list(records.quality)}
    raw |= {"rows": list(records.together), "guesses": list(records.guesses)}
    files = {
        "report.md": markdown(report, chosen),
        "report.json": json.dumps(report.to_json(), indent=1) + "\n",
        "records.json": json.dumps(raw, indent=None, separators=(",", ":")) + "\n",
        "report.html": page(report, chosen),
    }
    for name, text in files.items():
        (out / name).write_text(text, encoding="utf-8")
    print(files["report.md"], file=sys.stdout)
    return [out / name for name in files]
