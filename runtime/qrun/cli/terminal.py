"""What the commands say to a person: errors, notes and progress, all on stderr; and safe text on stdout."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import click

from qrun.errors import QrunError

WIDTH = 80
# A model's text could otherwise move the cursor, change the window's title or fill the clipboard. Kept
# are newline and tab; gone are the other control characters of both ranges, ESC among them.
_CONTROLS = dict.fromkeys([*(set(range(0x20)) - {0x09, 0x0A}), *range(0x7F, 0xA0)])


def printable(text: str) -> str:
    """``text`` without what a terminal would take for a command."""
    return text.translate(_CONTROLS)


def show(text: str) -> None:
    """Print a piece of a model's text at once; unchanged unless stdout is a terminal."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def note(message: str = "") -> None:
    """A line for the person, beside the answer."""
    click.secho(printable(message), err=True, dim=True)


def warn(message: str) -> None:
    click.secho("warning: ", err=True, fg="yellow", nl=False)
    click.echo(printable(message), err=True)


def complain(error: QrunError) -> None:
    """The one form in which an error reaches the person."""
    click.secho("error: ", err=True, fg="red", bold=True, nl=False)
    click.echo(printable(str(error)), err=True)


def size(count: float) -> str:
    """Bytes for people, in decimal units: 1.54 GB."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit != "MB" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


@contextmanager
def working(what: str) -> Iterator[None]:
    """Say what is being done while it is, in a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.text import Text

    # As a Text, in which brackets of a path are not markup.
    with Console(stderr=True, highlight=False).status(Text(printable(what))):
        yield


@contextmanager
def hashing(total: int) -> Iterator[Callable[[str, int], None]]:
    """A progress bar over ``total`` bytes that are hashed, in a terminal."""
    if not sys.stderr.isatty():
        yield lambda _name, _bytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=28), DownloadColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("checking the hashes", total=total)
        yield lambda _name, done: bar.advance(task, done)


def rows(facts: Mapping[str, str | Path]) -> Iterator[str]:
    """Names and values in two columns, wrapped at 80; a path stays on one line."""
    for name, value in facts.items():
        if isinstance(value, Path):
            yield f"{name:<12}{value}"
            continue
        yield textwrap.fill(
            value,
            WIDTH,
            initial_indent=f"{name:<12}",
            subsequent_indent=" " * 12,
            break_long_words=False,
            break_on_hyphens=False,
        )
