"""An ``Inspection`` for human eyes, within 80 columns."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qconvert.checkpoint.file_state import FileState
from qconvert.inspection.inspection import Inspection

_STATUS_STYLES = {"whole": "green", "missing": "yellow"}


def render(inspection: Inspection, console: Console) -> None:
    """Prints facts, costs and files, and at the end, where it is seen first, what is wrong."""
    console.print(
        f"[bold]{escape(inspection.name)}[/]  {inspection.parameters / 1e6:,.1f} million parameters"
    )
    for section, facts in groupby(inspection.facts, key=lambda fact: fact.section):
        _print_rows(console, section, ((fact.key, _shown(fact.value), fact.meaning) for fact in facts))
    _print_rows(console, "weights of an export", _weight_rows(inspection))
    _print_rows(console, "KV cache", _kv_rows(inspection))
    _print_files(console, inspection.files)
    console.print()
    if inspection.whole:
        console.print("[bold green]The checkpoint is whole.[/]")
        return
    console.print("[bold red]The checkpoint is not whole:[/]")
    shown = inspection.problems[:10]
    for problem in shown:
        console.print(f"  {escape(problem)}", highlight=False)
    if len(inspection.problems) > len(shown):
        console.print(f"  and {len(inspection.problems) - len(shown)} more (--json lists them all)")
    for hint in inspection.hints:
        console.print(f"[bold]what to do:[/] {escape(hint)}", highlight=False)


def readable_bytes(size: int) -> str:
    """``986.4 MB``: decimal units, as disks and file listings count."""
    value, units = float(size), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"


def _shown(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value)


def _weight_rows(inspection: Inspection) -> Iterable[tuple[str, str, str]]:
    for precision, size in inspection.weight_bytes.items():
        if size is None:
            yield precision, "-", "not for a model of these sizes"
        else:
            yield precision, readable_bytes(size), f"{8 * size / inspection.parameters:.1f} bits a weight"


def _kv_rows(inspection: Inspection) -> Iterable[tuple[str, str, str]]:
    for name, size in inspection.kv_bytes_per_token.items():
        full = readable_bytes(inspection.kv_bytes_full_context[name])
        yield (
            name,
            f"{size / 1024:g} KiB a token",
            f"{full} at {inspection.context_length:,} tokens",
        )


def _print_rows(console: Console, title: str, rows: Iterable[tuple[str, str, str]]) -> None:
    table = Table(
        box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False, width=min(console.width, 110)
    )
    table.add_column(width=24, style="cyan", overflow="fold")
    table.add_column(width=16, overflow="fold")
    table.add_column(ratio=1, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(f"\n[bold]{title}[/]")
    console.print(table)


def _print_files(console: Console, files: Iterable[FileState]) -> None:
    table = Table(
        box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False, width=min(console.width, 110)
    )
    table.add_column(max_width=32, style="cyan", overflow="fold")
    table.add_column(width=9, justify="right")
    table.add_column(width=9)
    table.add_column(ratio=1, overflow="fold")
    for state in files:
        style = _STATUS_STYLES.get(state.status, "red") if state.required or state.harmful else "dim"
        size = readable_bytes(state.size) if state.size else "-"
        status = f"[{style}]{state.status}[/]"
        table.add_row(escape(state.name), size, status, escape(state.detail))
    console.print("\n[bold]files[/]")
    console.print(table)
