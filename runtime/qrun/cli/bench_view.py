"""The results of ``qrun bench`` for people and for spreadsheets."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from qrun.cli.bench import Measured


def as_table(measured: Sequence[Measured]) -> RenderableType:
    """A row for each workload: median tokens per second and their range, within 80 columns."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    several = any(each.workload.rows > 1 for each in measured)
    for column in (*(("rows",) if several else ()), "depth", "prompt", "new"):
        table.add_column(column, justify="right", no_wrap=True, min_width=len(column))
    for column in ("prompt tokens/s", "new tokens/s", "first token"):
        table.add_column(column, justify="right", no_wrap=True)
    for each in measured:
        row, workload = each.to_json(), each.workload
        table.add_row(
            *((str(workload.rows),) if several else ()),
            f"{workload.depth:,}",
            f"{workload.prompt_tokens:,}",
            f"{workload.generated_tokens:,}",
            _rate(row["prefill_tokens_per_second"], row["prefill_range"]),
            _rate(row["decode_tokens_per_second"], row["decode_range"]),
            f"{row['time_to_first_token'] * 1000:,.0f} ms",
        )
    return table


def as_guesses(measured: Sequence[Measured]) -> str:
    """How many guesses came true, in all counted rounds together."""
    rounds = [each for one in measured for each in one.rounds]
    guessed, accepted = (sum(getattr(each, name) for each in rounds) for name in ("guessed", "accepted"))
    return f"guessed in steps of several tokens: {guessed:,} tokens, {accepted:,} came true"


def as_csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line for each workload, ranges as two columns."""
    flat = [
        {
            name: value
            for key, found in row.items()
            for name, value in (
                ((f"{key}_low", found[0]), (f"{key}_high", found[1]))
                if isinstance(found, list)
                else ((key, found),)
            )
        }
        for row in rows
    ]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def as_lines(facts: Mapping[str, Any]) -> list[str]:
    """What the figures depend on, in a few lines of up to 80 columns."""
    machine = facts["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    return [
        "",
        _model(facts["model"]),
        *([f"draft: {_model(facts['draft'])}"] if "draft" in facts else []),
        f"{machine['cpu']} ({', '.join(machine['cpu_flags']) or 'no known flags'})",
        f"{facts['device']}; {versions}",
        f"medians (range); load {facts['load_seconds']:.2f} s, "
        f"peak resident {facts['peak_rss_bytes'] / 1e9:.2f} GB",
    ]


def _rate(middle: float | None, found: Sequence[float] | None) -> str:
    if middle is None or found is None:
        return "-"
    digits = 0 if middle >= 100 else 1
    return f"{middle:,.{digits}f} ({found[0]:,.{digits}f}-{found[1]:,.{digits}f})"


def _model(facts: Mapping[str, Any]) -> str:
    size = f"{facts['bytes'] / 1e6:,.1f} MB"
    return f"{facts['name']}, {facts['precision']}, {size}, sha256 {facts['sha256'][:12]}"
