"""What the NVIDIA driver says of this machine, asked without any package: nothing is allocated."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

# CUdevice_attribute in cuda.h.
_MAJOR, _MINOR = 75, 76


@dataclass(frozen=True)
class Gpu:
    """The first GPU: its name, compute capability ("8.9") and memory in bytes, used or not."""

    name: str
    compute_capability: str
    total_memory: int


def why_no_gpu() -> str | None:
    """Why this machine has no NVIDIA GPU to run or build on, or None if it has one."""
    driver = _driver()
    if driver is None:
        return "there is no NVIDIA driver (libcuda.so.1)"
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return "the NVIDIA driver finds no GPU"
    return None


def first_gpu() -> Gpu | None:
    """The GPU that CUDA calls device 0, or None where ``why_no_gpu`` says why."""
    if why_no_gpu() is not None:
        return None
    driver = _driver()
    device, name = ctypes.c_int(0), ctypes.create_string_buffer(256)
    major, minor, total = ctypes.c_int(0), ctypes.c_int(0), ctypes.c_size_t(0)
    failed = (
        driver.cuDeviceGet(ctypes.byref(device), 0)
        or driver.cuDeviceGetName(name, len(name), device)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
        or driver.cuDeviceTotalMem_v2(ctypes.byref(total), device)
    )
    if failed:
        return None
    return Gpu(name.value.decode(errors="replace"), f"{major.value}.{minor.value}", total.value)


def _driver() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
