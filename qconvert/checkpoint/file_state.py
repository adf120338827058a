"""What can be said of one file of a checkpoint: whole, or what is wrong with it and what to do."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Status = Literal["whole", "missing", "truncated", "pointer", "garbage", "refused"]

DOWNLOAD_HINT = "download the file again"
POINTER_HINT = "run `git lfs install && git lfs pull` in the folder, or download the files again"
MERGE = (
    "give the model that it was trained on, and the adapter with it: qconvert export MODEL --adapter FOLDER; "
    "or merge it with peft: merge_and_unload()"
)
_STATUS_WORDS: dict[Status, str] = {
    "whole": "whole",
    "missing": "missing",
    "truncated": "truncated",
    "pointer": "a pointer",
    "garbage": "unusable",
    "refused": "refused",
}
_POINTER_START = b"version https://git-lfs.github.com/spec/"


class BrokenFileError(Exception):
    """Why one file cannot be used; whoever looks at the file turns it into a ``FileState``."""

    def __init__(self, status: Status, detail: str, hint: str = DOWNLOAD_HINT) -> None:
        self.status: Status = status
        self.detail = detail
        self.hint = hint
        super().__init__(detail)


@dataclass(frozen=True)
class FileState:
    """One file of a checkpoint: ``size`` in bytes (0 where missing), what is wrong, what to do.

    ``required`` is false for files whose absence takes nothing from an export but convenience.
    """

    name: str
    size: int
    status: Status
    detail: str = ""
    hint: str = ""
    required: bool = True

    @property
    def harmful(self) -> bool:
        """Whether the checkpoint is not whole because of this file."""
        return self.status != "whole" and (self.required or self.status != "missing")

    @property
    def problem(self) -> str:
        """What is wrong with the file, in one sentence without a full stop."""
        return f"{self.name} is {_STATUS_WORDS[self.status]}: {self.detail}"


def refuse_pointer(path: Path) -> None:
    """Raises ``BrokenFileError`` for what Git LFS leaves in place of a file that it did not fetch."""
    with path.open("rb") as file:
        head = file.read(200)
    if head.startswith(_POINTER_START):
        size = re.search(rb"^size (\d+)$", head, re.MULTILINE)
        meant = f" of {int(size[1]):,} bytes" if size else ""
        raise BrokenFileError("pointer", f"a Git LFS pointer in place of a file{meant}", POINTER_HINT)
