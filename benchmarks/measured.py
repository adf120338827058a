"""A program run as a child process: seconds, CPU seconds, and the most memory it and its children held."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from time import perf_counter

import psutil

_SAMPLE_SECONDS = 0.02
# Finding a program's children means looking at every process of the system, which takes the program's own
# time: it is done once in so many samples.
_SAMPLES_PER_TREE = 10


@dataclass(frozen=True)
class Run:
    """``peak_bytes`` is resident memory, mapped files included, the larger of two measurements: the
    system's own maximum for a single process, and the sampled sum over the process tree."""

    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int


class ProgramFailedError(RuntimeError):
    """A measured program ended with another exit code than 0; the message holds the end of its output."""


def run_measured(
    command: Sequence[str],
    log: Path,
    *,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    limit_bytes: int | None = None,
) -> Run:
    """Run a program to its end; its output goes to ``log``. Above ``limit_bytes`` of memory it is killed.

    The caller must be small: Linux counts a parent's memory at the time of the fork as the child's, so
    import neither torch nor numpy where this is called.

    Raises:
        ProgramFailedError: see there.
    """
    with log.open("wb") as output:
        started = perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=cwd, env=environment)
        tree = _TreeSampler(process.pid, limit_bytes)
        _, status, usage = os.wait4(process.pid, 0)
        wall = perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)  # so that Popen does not wait for it again
        sampled = tree.stop()
        if tree.killed:
            output.write(f"\nended: it held more than {limit_bytes} bytes of memory\n".encode())
    if process.returncode != 0:
        tail = log.read_text(errors="replace")[-2000:]
        raise ProgramFailedError(f"{' '.join(command)} ended with exit code {process.returncode}:\n{tail}")
    return Run(wall, usage.ru_utime + usage.ru_stime, max(usage.ru_maxrss * 1024, sampled))


class _TreeSampler:
    """Samples the resident memory of a process and its descendants until it is stopped.

    One process's peak is exact from the system (``ru_maxrss``); only where several run at once does the
    sum of samples exceed it.
    """

    def __init__(self, pid: int, limit_bytes: int | None) -> None:
        self.killed = False
        self._limit = limit_bytes
        self._peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, args=(pid,), daemon=True)
        self._thread.start()

    def _sample(self, pid: int) -> None:
        tree: list[psutil.Process] = []
        for sample in count():
            if self._done.wait(_SAMPLE_SECONDS):
                break
            try:
                if sample % _SAMPLES_PER_TREE == 0:
                    tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
                held = sum(_resident(process) for process in tree)
                self._peak = max(self._peak, held)
                if self._limit is not None and held > self._limit and not self.killed:
                    self.killed = True
                    for process in tree:
                        process.kill()
            except psutil.Error:
                continue

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return self._peak


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0
