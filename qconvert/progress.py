"""Progress on stderr for anything that may take over two seconds; silent when it is not a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

Advance = Callable[..., None]


class Progress:
    """Named steps of one command. ``quiet`` or a redirected stderr shows nothing."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = Console(stderr=True, quiet=quiet)
        self._enabled = not quiet and self._console.is_terminal

    def note(self, *notes: str) -> None:
        """Say what the user may not expect, whether or not this is a terminal."""
        for text in notes:
            self._console.print(f"note: {text}", markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def task(self, description: str, total: float | None = None) -> Iterator[Advance]:
        """Show one step; yields a function whose last argument is the amount done since the last call."""
        if not self._enabled:
            yield lambda *_: None
            return
        columns = (
            TextColumn("{task.description:<26}"),
            BarColumn(bar_width=28),
            TaskProgressColumn(),
            TimeElapsedColumn(),
        )
        with RichProgress(*columns, console=self._console) as bar:
            task = bar.add_task(description, total=total)
            yield lambda *done: bar.advance(task, done[-1])
            bar.update(task, total=total or 1, completed=total or 1)
