"""What ``qrun batch`` shows: a line of progress in a terminal, and the summary."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from qrun.cli.terminal import note, printable

if TYPE_CHECKING:
    from typing_extensions import Self

    from qrun.batch.order import Progress


class BatchProgress:
    """One line with a bar, the rate and the time left; in a terminal only."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._told = False
        self._last: Progress | None = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("answering"),
                BarColumn(bar_width=18),
                MofNCompleteColumn(),
                TextColumn("{task.fields[facts]}"),
                TimeRemainingColumn(compact=True, elapsed_when_finished=True),
                console=Console(stderr=True, highlight=False),
                transient=True,
                speed_estimate_period=300,
            )
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def show(self, progress: Progress) -> None:
        """Something was answered."""
        self._last = progress
        if not self._told:
            self._told = True
            if progress.earlier:
                note(f"going on: {progress.earlier:,} of {progress.lines:,} lines are answered already")
            if progress.rows is not None:
                note(f"{_prompts(progress.rows.count)} at once: {progress.rows.why}")
        if self._bar is None:
            return
        if self._task is None:
            self._task = self._bar.add_task("", total=progress.lines, completed=progress.earlier, facts="")
        self._bar.update(self._task, completed=progress.done, facts=_facts(progress))

    def close(self) -> None:
        """Take the line away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def stopped(self) -> str:
        """What is said after Ctrl-C."""
        last = self._last
        if last is None or not last.done:
            return "stopped before the first answer: nothing is left behind"
        return (
            f"stopped: {last.done:,} of {last.lines:,} lines are answered and kept; "
            "the same command goes on from there"
        )


def summary_lines(summary: Mapping[str, Any], output: str) -> Iterator[str]:
    """The summary for people, in 80 columns."""
    errors = summary["errors"]
    count = sum(errors.values())
    earlier = summary["answered_before_this_start"]
    yield (
        f"{summary['lines']:,} {'line' if summary['lines'] == 1 else 'lines'}: "
        f"{summary['answered']:,} answered, {count:,} with an error"
        + (f" ({earlier:,} of them before)" if earlier else "")
    )
    for kind, number in errors.items():
        yield f"  {printable(kind):<28}{number:,}"
    yield f"tokens: {summary['prompt_tokens']:,} of prompts, {summary['completion_tokens']:,} of answers"
    if summary["tokens_per_second"] is not None:
        yield (
            f"{summary['seconds']:,.1f} s: {summary['tokens_per_second']:,.1f} tokens/s, "
            f"{summary['completion_tokens_per_second']:,.1f} of answers; "
            + (f"{summary['nodes']} nodes" if "nodes" in summary else f"{_prompts(summary['rows'])} at once")
        )
    yield printable(output)


def _prompts(count: int) -> str:
    return "1 prompt" if count == 1 else f"{count} prompts"


def _facts(progress: Progress) -> str:
    """The rate and the errors, short."""
    facts = []
    if progress.seconds:
        tokens = progress.new_prompt_tokens + progress.new_completion_tokens
        facts.append(f"{tokens / progress.seconds:,.0f} tokens/s")
    if count := sum(progress.errors.values()):
        facts.append(f"[red]{count:,} errors[/red]")
    return " ".join(facts)
