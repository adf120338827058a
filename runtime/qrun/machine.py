"""What this machine offers to this process: cores and memory."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

_OWN_GROUPS = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")
_MEMORY = Path("/proc/meminfo")
# Names of mallopt(3) in malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def usable_cores() -> int:
    """Cores that this process may use: CPU affinity and the quotas of its control groups (v1 and v2)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([cores, *(max(1, round(quota)) for quota in _cpu_quotas())])


def available_memory() -> int | None:
    """Bytes that can still be allocated without swapping, or None where that is not known.

    The least of the machine's and the control groups' (v1 and v2) remaining memory; Linux only.
    """
    limits = [*_free_of_machine(), *_free_of_groups()]
    return max(0, min(limits)) if limits else None


def keep_freed_memory() -> None:
    """Let the C library (glibc) keep what this process frees, up to half a gigabyte, and take it again.

    By default it gives large blocks back at once, and the system clears every page of the next one: where
    megabytes are allocated for each of many short operations, that takes longer than these do.
    """
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_TRIM_THRESHOLD, 512 << 20)
        library.mallopt(_M_MMAP_THRESHOLD, 64 << 20) or library.mallopt(_M_MMAP_THRESHOLD, 32 << 20)


def give_back_memory() -> None:
    """Return freed memory to the system, where the C library keeps it (glibc)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _cpu_quotas() -> Iterator[float]:
    """Cores that each control group grants: its own, and each that it lies in."""
    for group in _own_groups("cpu"):
        limit, period = _numbers(group / "cpu.max"), [100_000]
        if not limit:
            limit, period = _numbers(group / "cpu.cfs_quota_us"), _numbers(group / "cpu.cfs_period_us")
        if limit and (limit + period)[1] > 0 and limit[0] > 0:  # -1 and "max" are no limit
            yield limit[0] / (limit + period)[1]


def _free_of_groups() -> Iterator[int]:
    for group in _own_groups("memory"):
        for most, now in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, used = _numbers(group / most), _numbers(group / now)
            if limit and used:
                yield limit[0] - used[0]


def _free_of_machine() -> Iterator[int]:
    try:
        lines = _MEMORY.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _own_groups(controller: str) -> Iterator[Path]:
    """Folders of the control groups that this process is in, the innermost first.

    In a container the path may be the host's, of which only the root is visible inside.
    """
    try:
        entries = [line.split(":", 2) for line in _OWN_GROUPS.read_text().splitlines()]
    except OSError:
        entries = []
    for entry in entries or [["0", "", "/"]]:
        if len(entry) != 3:
            continue
        _, controllers, path = entry
        if controllers == "":
            mounts = [_GROUPS, _GROUPS / "unified"]
        elif controller in controllers.split(","):
            mounts = [_GROUPS / controllers, _GROUPS / controller]
        else:
            continue
        inside = PurePosixPath(path.lstrip("/"))
        for mount in mounts:
            yield from (mount / folder for folder in (inside, *inside.parents))


def _numbers(path: Path) -> list[int]:
    """The whole numbers in a small file; nothing where it is not there or says "max"."""
    try:
        return [int(word) for word in path.read_text().split()]
    except (OSError, ValueError):
        return []
