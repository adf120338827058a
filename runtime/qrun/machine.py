"""What this machine offers to this process: cores and memory."""

from __future__ import annotations

import os
from pathlib import Path


def usable_cores() -> int:
    """Cores that this process may really use: CPU affinity and the control group's (v2) quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):
        pass
    return cores


def available_memory() -> int | None:
    """Bytes that can still be allocated without swapping, or None where that is not known.

    The least of the machine's and the control group's (v2) remaining memory; Linux only.
    """
    limits = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(int(line.split()[1]) * 1024)
        group = Path("/sys/fs/cgroup")
        maximum = (group / "memory.max").read_text().strip()
        if maximum != "max":
            limits.append(int(maximum) - int((group / "memory.current").read_text()))
    except (OSError, ValueError, IndexError):
        pass
    return max(0, min(limits)) if limits else None
