"""What a user wants of a batch, and how far it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from qrun.batch.asking import Defaults
from qrun.batch.opening import Wanted
from qrun.batch.rows import Rows


@dataclass(frozen=True)
class Order:
    """What the user wants.

    Attributes:
        input: the file; None for ``pipe``.
        output: the file to write.
        wanted: what is said of the input.
        defaults: for lines that say nothing themselves.
        unordered: write answers as they come.
        prefix: before the names of the answer's columns.
        rows: prompts at once; None to measure.
        prefix_bytes: of memory, for beginnings of prompts.
        max_errors: more error records than this end the job; None for no limit.
        force: forget an earlier job, and replace the output.
        pipe: the input, where it is no file.
    """

    input: Path | None
    output: Path
    wanted: Wanted = field(default_factory=Wanted)
    defaults: Defaults = field(default_factory=Defaults)
    unordered: bool = False
    prefix: str = ""
    rows: int | None = None
    prefix_bytes: int = 512_000_000
    max_errors: int | None = None
    force: bool = False
    pipe: BinaryIO | None = None


@dataclass
class Progress:
    """How far a job is.

    Attributes:
        lines: of the input.
        done: answered, with those before a restart.
        earlier: answered before this start.
        errors: error records by kind.
        prompt_tokens, completion_tokens: of all records.
        new_prompt_tokens, new_completion_tokens: since this start.
        seconds: since the first prompt of this start.
        rows: prompts at once; None where nothing was left to do.
    """

    lines: int
    done: int
    earlier: int
    errors: dict[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    new_prompt_tokens: int = 0
    new_completion_tokens: int = 0
    seconds: float = 0.0
    rows: Rows | None = None

    def take(self, errors: Mapping[str, int], prompt_tokens: int, completion_tokens: int) -> None:
        """The totals of all records."""
        self.errors = dict(errors)
        self.prompt_tokens, self.completion_tokens = prompt_tokens, completion_tokens

    def to_json(self) -> dict[str, Any]:
        """The summary."""
        rate = (self.new_prompt_tokens + self.new_completion_tokens) / self.seconds if self.seconds else None
        new = self.new_completion_tokens / self.seconds if self.seconds else None
        return {
            "lines": self.lines,
            "answered": self.done - sum(self.errors.values()),
            "errors": dict(sorted(self.errors.items())),
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "answered_before_this_start": self.earlier,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": None if rate is None else round(rate, 2),
            "completion_tokens_per_second": None if new is None else round(new, 2),
            "rows": None if self.rows is None else self.rows.count,
        }
