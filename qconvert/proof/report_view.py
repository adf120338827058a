"""A verification report for people: a table in the terminal, and verification.md."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qconvert.proof.limits import LIMITS, limit_value
from qconvert.proof.report import REPORT_JSON, REPORT_MARKDOWN, PathResult, Report

_LONGEST_PERPLEXITY = 10_000
_SHORT_PATHS = {
    "whole, growing cache": "whole, growing",
    "in chunks, growing cache": "chunks, growing",
    "in chunks": "chunks",
    "in chunks, then token by token": "chunks, steps",
    "cut back, then token by token": "cut back, steps",
    "token by token": "steps",
    "token by token, growing cache": "steps, growing",
    "cut back and continued": "cut back",
    "cut back and continued, growing cache": "cut back, growing",
    "last position only": "last only",
    "prompt by its own graph": "prompt graph",
}


def write_report(report: Report, folder: Path) -> None:
    """Write ``verification.json`` and ``verification.md`` into a model folder."""
    text = json.dumps(report.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
    (folder / REPORT_JSON).write_text(text + "\n", encoding="utf-8")
    (folder / REPORT_MARKDOWN).write_text(markdown(report), encoding="utf-8")


def summary(report: Report) -> RenderableType:
    """The outcome in a table of at most 80 columns, measured against the checkpoint."""
    table = Table(pad_edge=False, box=None, header_style="bold", padding=(0, 2, 0, 0))
    for name in ("case", "path", "tokens", "max diff", "mean KL", "top-1", "perplexity"):
        left = name in ("case", "path")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    previous = None
    for path in report.paths:
        table.add_row("" if path.case == previous else path.case, *_cells(path))
        previous = path.case
    lines: list[RenderableType] = [table, Text(""), Text(_weights_line(report)), Text(greedy_line(report))]
    lines += [Text(line) for line in _twin_lines(report)]
    lines += [Text(f"note: {note}", style="yellow") for note in report.notes]
    verdict, style = ("PASSED", "bold green") if report.passed else ("FAILED", "bold red")
    lines.append(Text(f"{verdict} in {report.seconds:.1f} s: {_reference_line(report)}", style=style))
    if not report.passed:
        lines.append(Text(report.failures()))
    return Group(*lines)


def _cells(path: PathResult) -> tuple[str, ...]:
    measures = path.measures["checkpoint"]
    return (
        _SHORT_PATHS.get(path.path, path.path),
        str(measures.positions),
        f"{measures.max_difference:.1e}",
        f"{measures.mean_kl:.1e}",
        f"{measures.top1:.3f}",
        _perplexity(measures.export_perplexity, measures.reference_perplexity, 2),
    )


def _perplexity(export: float | None, reference: float | None, digits: int) -> str:
    """ "31.98 (31.86)", or nothing where there is no text."""
    if export is None or reference is None:
        return ""
    # A random model's may be of the order of its vocabulary: the column would be cut off.
    kind = f".{digits}f" if max(export, reference) < _LONGEST_PERPLEXITY else ".1e"
    return f"{export:{kind}} ({reference:{kind}})"


def _weights_line(report: Report) -> str:
    weights = report.weights
    if weights.faults:
        state = f"{len(weights.faults)} tensors are wrong"
    else:
        exact = weights.worst_tensor is None
        state = "all exact" if exact else f"none off by over {weights.worst_steps:.3f} steps"
        if weights.moved_tensors:
            state = "" if exact else f"{state}, "
            state += f"{weights.moved_tensors} rounded on a text, by {weights.moved_steps:.1f} steps at most"
    return f"weights: {weights.values / 1e6:,.1f}M in {weights.tensors} tensors, {state}"


def _twin_lines(report: Report) -> list[str]:
    lines = []
    for twin in report.twins:
        line = f"sharp twin of {twin.graph}: logits off by {twin.max_difference:.1e} at most"
        if twin.mean_rounding is not None:
            line += f"; rounding costs {twin.mean_rounding:.1e}"
        lines.append(line)
    return lines


def greedy_line(report: Report) -> str:
    """One sentence on the greedy answer."""
    check = report.greedy.checks["checkpoint"]
    if report.greedy.error is not None:
        return f"greedy: ended after {check.steps} tokens, {report.greedy.error}"
    if check.first is None:
        return f"greedy: {check.steps} tokens, identical with PyTorch"
    text = (
        f"greedy: {check.agreed} of {check.steps} tokens as PyTorch takes them, "
        f"first other one at step {check.first.step} (margin {check.first.margin:.2g})"
    )
    own = report.greedy.checks.get("own weights")
    if own is None:
        return f"{text}, {check.outcome(limit_value('near_tie', report.precision))}"
    return f"{text}; {own.agreed} with the export's weights"


def _reference_line(report: Report) -> str:
    return f"{report.precision} on {report.device}, PyTorch in {report.reference}"


def markdown(report: Report) -> str:
    """``verification.md``: everything that was compared and with what result."""
    own = any("own weights" in path.measures for path in report.paths)
    lines = [
        f"# Verification of {report.name}, {report.precision}: {'passed' if report.passed else 'FAILED'}",
        "",
        f"The folder ran through qrun on {report.device}. Reference: PyTorch in {report.reference}.",
        "Every number is of the export against that reference; KL and perplexity are in nats and per token.",
        "",
        *(f"- FAILED {failure.where}: {failure.what}" for failure in report.failed),
        *(f"- Note: {note}" for note in report.notes),
        *([""] if report.failed or report.notes else []),
        "## Against the checkpoint",
        "",
        *_table(report, "checkpoint"),
        "",
    ]
    if own:
        lines += [
            "## Against PyTorch with the export's own weights",
            "",
            "The graph alone, without the rounding of the weights.",
            "",
            *_table(report, "own weights"),
            "",
        ]
    lines += ["## Weights and greedy answer", "", f"- {_weights_line(report)}", f"- {greedy_line(report)}"]
    lines += [f"- {line}" for line in _twin_lines(report)]
    lines += [f"- {fault.tensor}: {fault.what}" for fault in report.weights.faults]
    lines += ["", "## Limits", "", "| limit | compared with | value |", "|---|---|---|"]
    lines += [
        f"| {limit.title} | {limit.against} | {limit.values[report.precision]:g} |"
        for limit in LIMITS
        if report.precision in limit.values
    ]
    return "\n".join(lines) + "\n"


def _table(report: Report, against: str) -> list[str]:
    lines = [
        "| case | path | positions | max diff (at) | mean diff "
        "| mean KL | max KL (at) | top-1 | perplexity (PyTorch's) |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for path in report.paths:
        measures = path.measures[against]
        perplexity = _perplexity(measures.export_perplexity, measures.reference_perplexity, 3)
        lines.append(
            f"| {path.case} | {path.path} | {measures.positions} "
            f"| {measures.max_difference:.2e} ({measures.max_difference_at}) "
            f"| {measures.mean_difference:.2e} | {measures.mean_kl:.2e} "
            f"| {measures.max_kl:.2e} ({measures.max_kl_at}) "
            f"| {measures.top1:.4f} | {perplexity} |"
        )
    return lines
