"""If these fail, qrun takes threads or memory that a container does not have."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys

import pytest

from qrun import machine

GB = 10**9
V2 = "0::/user.slice/session.scope\n"
V1 = "12:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n"
NO_LIMIT = "9223372036854771712"

# What /proc/self/cgroup says, the files below /sys/fs/cgroup, and the cores of eight that are left.
CORES = {
    "no group": ("", {}, 8),
    "v2 without a quota": (V2, {"cpu.max": "max 100000"}, 8),
    "v2, a container's root": ("0::/\n", {"cpu.max": "200000 100000"}, 2),
    "v2, half a core": ("0::/\n", {"cpu.max": "50000 100000"}, 1),
    "v2, the group's own": (V2, {"user.slice/session.scope/cpu.max": "300000 100000"}, 3),
    "v2, one further out": (
        V2,
        {"user.slice/cpu.max": "200000 100000", "user.slice/session.scope/cpu.max": "400000 100000"},
        2,
    ),
    "v2, a longer period": ("0::/\n", {"cpu.max": "1600000 400000"}, 4),
    "v1 without a quota": (
        V1,
        {"cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
        8,
    ),
    "v1, half a core": (
        V1,
        {"cpu,cpuacct/cpu.cfs_quota_us": "50000", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
        1,
    ),
    "v1, under its short name": (
        V1,
        {"cpu/cpu.cfs_quota_us": "250000", "cpu/cpu.cfs_period_us": "100000"},
        2,
    ),
    "v1, seen from outside": (
        V1,
        {
            "cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "300000",
            "cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000",
        },
        3,
    ),
    "v1 and v2 together": (
        V1 + "0::/\n",
        {
            "cpu/cpu.cfs_quota_us": "400000",
            "cpu/cpu.cfs_period_us": "100000",
            "unified/cpu.max": "max 100000",
        },
        4,
    ),
    "nonsense": ("x\n0::\n", {"cpu.max": "many"}, 8),
    "a period of nothing": ("0::/\n", {"cpu.max": "1000 0"}, 8),
}
MEMORY = {
    "no group": ("", {}, 8 * GB),
    "v2": ("0::/\n", {"memory.max": str(3 * GB), "memory.current": str(GB)}, 2 * GB),
    "v2 without a limit": ("0::/\n", {"memory.max": "max", "memory.current": str(GB)}, 8 * GB),
    "v2, one further out": (V2, {"user.slice/memory.max": str(GB), "user.slice/memory.current": "0"}, GB),
    "v1": (V1, {"memory/memory.limit_in_bytes": str(2 * GB), "memory/memory.usage_in_bytes": str(GB)}, GB),
    "v1 without a limit": (
        V1,
        {"memory/memory.limit_in_bytes": NO_LIMIT, "memory/memory.usage_in_bytes": "1"},
        8 * GB,
    ),
    "used up": ("0::/\n", {"memory.max": str(GB), "memory.current": str(2 * GB)}, 0),
}


@pytest.fixture
def groups(tmp_path, monkeypatch):
    def make(own: str, files: dict[str, str]) -> None:
        (tmp_path / "own").write_text(own)
        (tmp_path / "meminfo").write_text("MemTotal: 1 kB\nMemAvailable: 7812500 kB\n")
        for name, content in files.items():
            path = tmp_path / "groups" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content + "\n")
        monkeypatch.setattr(machine, "_OWN_GROUPS", tmp_path / "own")
        monkeypatch.setattr(machine, "_GROUPS", tmp_path / "groups")
        monkeypatch.setattr(machine, "_MEMORY", tmp_path / "meminfo")
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))

    return make


@pytest.mark.parametrize("case", CORES)
def test_quotas_of_control_groups_count(case, groups):
    own, files, cores = CORES[case]
    groups(own, files)
    assert machine.usable_cores() == cores


@pytest.mark.parametrize("case", MEMORY)
def test_limits_of_control_groups_count(case, groups):
    own, files, free = MEMORY[case]
    groups(own, files)
    assert machine.available_memory() == free


def test_a_system_without_such_files_is_not_limited_by_them(groups, tmp_path):
    groups("", {})
    for name in ("own", "meminfo"):
        (tmp_path / name).unlink()
    assert machine.usable_cores() == 8
    assert machine.available_memory() is None


FAULTS = """
import resource, sys
from qrun.machine import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
for _ in range(3):  # the C library learns from the first
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [b"x" * (12 << 20) for _ in range(4)]
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_freed_memory_is_taken_again_without_the_system() -> None:
    def faults(how: str) -> int:
        command = [sys.executable, "-c", FAULTS, how]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    pages = 4 * (12 << 20) // resource.getpagesize()
    assert faults("kept") < pages // 10
    assert faults("given back") > pages // 2
