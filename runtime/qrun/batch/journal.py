"""What is kept of a job while it runs, so that it goes on after a kill at any moment.

Beside OUTPUT lies the folder ``OUTPUT.qrun-batch``:

    job.json     what the job is: input, options and model; and, once its output is published, its summary
    answers      one record a line, each with a checksum; the last one may be cut off by a kill
    input        what came through a pipe
    output       the output, until it is published
"""

from __future__ import annotations

import fcntl
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import msgspec

from qrun.batch.lines import Record
from qrun.errors import QrunError

SUFFIX = ".qrun-batch"
_NAMES = ("answers", "input", "output", "output.new", "job.json.new", "job.json")
# A machine that loses its power loses the answers of so many seconds, which are then made again.
_SYNC_SECONDS = 2.0


@dataclass(frozen=True)
class Entry:
    """A record as it is kept.

    Attributes:
        record: the answer to a line; None for the beginning of an output that grows.
        end: length of the output file with this record, where that grows as answers come.
        crc: of the output file up to there.
    """

    record: Record | None
    end: int = 0
    crc: int = 0


class Journal:
    """The folder of a job, held by one process at a time.

    Attributes:
        folder: where it lies.
        done: for each line that is answered, where its entry begins.
        errors: error records by kind.
        prompt_tokens, completion_tokens: of all records.
        last: the last entry.

    Args:
        output: the job's output file.

    Raises:
        QrunError: another process works on this output, or the folder is somebody else's.
    """

    def __init__(self, output: Path) -> None:
        self.output, self.folder = output, output.with_name(output.name + SUFFIX)
        self.done: dict[int, int] = {}
        self.errors: Counter[str] = Counter()
        self.prompt_tokens = self.completion_tokens = 0
        self.last: Entry | None = None
        self._is_foreign = False
        self._file: Any = None
        self._reader: Any = None
        self._end = 0
        self._synced = monotonic()
        self._lock = self._hold()

    def path(self, name: str) -> Path:
        """A file of the folder."""
        return self.folder / name

    def read_job(self) -> dict[str, Any] | None:
        """What job.json says; None where the job is new.

        Raises:
            QrunError: it is not ours.
        """
        try:
            found = json.loads(self.path("job.json").read_bytes())
            assert isinstance(found["job"], dict), "a job"
            return dict(found)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AssertionError):
            self._is_foreign = True
            raise QrunError(
                "this is no job of `qrun batch`", where=self.path("job.json"), hint="remove or rename it"
            ) from None

    def write_job(self, content: Mapping[str, Any]) -> None:
        """Write job.json, whole or not at all."""
        new = self.path("job.json.new")
        with new.open("w", encoding="utf-8") as file:
            json.dump(content, file, ensure_ascii=False, indent=2)
            sync(file)
        new.replace(self.path("job.json"))

    def open(self) -> None:
        """Read what is answered, and cut off what a kill has left of an entry."""
        path = self.path("answers")
        path.touch()
        self._file = path.open("r+b", buffering=0)
        for begin, entry in self._entries():
            self._count(begin, entry)
        self._file.truncate(self._end)
        self._file.seek(self._end)

    def rewind(self, length: int) -> None:
        """Forget the entries after those whose output fits into ``length`` bytes."""
        # The first of them: "end" only grows. Entries are read one by one, since each holds a whole answer.
        first = next((begin for begin, entry in self._entries() if entry.end > length), None)
        if first is not None:
            self._file.truncate(first)
            self._file.close()
            self.done.clear()
            self.errors.clear()
            self.prompt_tokens = self.completion_tokens = self._end = 0
            self.last = None
            self.open()

    def add(self, record: Record | None, *, end: int = 0, crc: int = 0) -> None:
        """Keep a record; after this a kill does not lose it.

        Raises:
            OSError: the disk is full; the journal then ends with the record before.
        """
        entry = Entry(record, end, crc)
        payload = msgspec.json.encode(entry)
        line = b"%08x %s\n" % (zlib.crc32(payload), payload)
        begin, left = self._end, memoryview(line)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError:
            self._file.truncate(begin)
            self._file.seek(begin)
            raise
        self._end = begin + len(line)
        self._count(begin, entry)
        if monotonic() - self._synced > _SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = monotonic()

    def get(self, number: int) -> Record:
        """The record of a line that is ``done``."""
        if self._reader is None:
            self._reader = self.path("answers").open("rb")
        self._reader.seek(self.done[number])
        entry = _read(self._reader.readline())
        assert entry is not None, "it was read before"
        assert entry.record is not None, "it is a line's"
        return entry.record

    @property
    def is_empty(self) -> bool:
        """Whether no answer is kept."""
        path = self.path("answers")
        return not path.exists() or not path.stat().st_size

    def remove_content(self, *, keep: str = "") -> None:
        """Remove what is ours in the folder; job.json last, since that says what the rest is."""
        self.close()
        for name in _NAMES:
            if name != keep:
                self.path(name).unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove what is ours, and the folder; a folder with somebody else's job.json is left as it is."""
        if self._is_foreign:
            return
        self.remove_content()
        with suppress(OSError):
            self.folder.rmdir()

    def close(self) -> None:
        """Write everything to the disk."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def release(self) -> None:
        """Let other processes have the folder."""
        self.close()
        os.close(self._lock)

    def _count(self, begin: int, entry: Entry) -> None:
        record, self.last = entry.record, entry
        if record is None:
            return
        self.done[record.number] = begin
        if record.error is not None:
            self.errors[record.error] += 1
        self.prompt_tokens += record.prompt_tokens
        self.completion_tokens += record.completion_tokens

    def _entries(self) -> Iterator[tuple[int, Entry]]:
        """Whole entries and where they begin; ``_end`` is set behind the last one."""
        self._end = 0
        with self.path("answers").open("rb") as file:
            for line in file:
                entry = _read(line)
                if entry is None:
                    return
                begin, self._end = self._end, self._end + len(line)
                yield begin, entry

    def _hold(self) -> int:
        while True:
            try:
                self.folder.mkdir(exist_ok=True)
            except FileExistsError:
                raise QrunError("this is a file, and a folder is needed here", where=self.folder) from None
            lock = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                raise QrunError(
                    f"another `qrun batch` is writing to {self.output}",
                    where=self.folder,
                    hint="wait until it has ended, or give another --output",
                ) from None
            # The process that has just ended may have removed it.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), self.folder.stat()):
                    break
            os.close(lock)
        foreign = sorted(path.name for path in self.folder.iterdir() if path.name not in _NAMES)
        if foreign:
            os.close(lock)
            raise QrunError(
                f"the folder of this job holds files that are not ours: {foreign[0]}",
                where=self.folder,
                hint="move them away, or give another --output",
            )
        return lock


def sync(file: Any) -> None:
    """Have the system write a file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def _read(line: bytes) -> Entry | None:
    """The entry in a line; None where it was cut off, or damaged."""
    check, space, payload = line.partition(b" ")
    if not (space and payload.endswith(b"\n")):
        return None
    try:
        if int(check, 16) != zlib.crc32(payload[:-1]):
            return None
        return msgspec.json.decode(payload, type=Entry)
    except (ValueError, msgspec.MsgspecError):
        return None
