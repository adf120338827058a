"""The one error family of this project: what happened, where, and what to do about it."""

from __future__ import annotations

from os import PathLike


class QrunError(Exception):
    """A mistake in the input or the environment that the user can mend.

    The command line prints it without a traceback and exits with 1. A bug of ours is never a
    ``QrunError``: it is an assertion or an ordinary exception.

    Args:
        what: one sentence that says what is wrong, naming the bad value.
        where: the file (and key, tensor or line) in which it was found.
        hint: what to do next, as an instruction.
    """

    def __init__(
        self, what: str, *, where: str | PathLike[str] | None = None, hint: str | None = None
    ) -> None:
        self.what = what
        self.where = None if where is None else str(where)
        self.hint = hint
        super().__init__(str(self))

    def __str__(self) -> str:
        lines = [self.what]
        if self.where is not None:
            lines.append(f"  where: {self.where}")
        if self.hint is not None:
            lines.append(f"  what to do: {self.hint}")
        return "\n".join(lines)
