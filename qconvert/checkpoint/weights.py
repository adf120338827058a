"""The checkpoint's tensors, one at a time: a tensor's mapped pages are given back once it has been used."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qconvert.checkpoint.computed import computed_of

if TYPE_CHECKING:
    import torch

_MADV_DONTNEED = 4


class CheckpointWeights:
    """Named tensors of a loaded model. ``release`` drops a mapped tensor's pages from memory.

    Tensors that are computed (``computed.py``) come in float32, and are held until they are released.
    """

    def __init__(self, model: Any, on_use: Callable[[str, int], None] | None = None) -> None:
        self._tensors: dict[str, torch.Tensor] = dict(model.state_dict(keep_vars=False))
        self._computed = computed_of(model)
        self._held: dict[str, torch.Tensor] = {}
        self._mapped = _mapped_safetensors()
        self._on_use = on_use

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._computed:
            return self._tensors[name].detach()
        if name not in self._held:
            self._held[name] = self._computed[name].rows(slice(None))
        return self._held[name]

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, without computing it."""
        return tuple(self._tensors[name].shape)

    def rows(self, name: str, wanted: slice | torch.Tensor) -> torch.Tensor:
        """Some rows of a tensor in float32."""
        if name in self._computed and name not in self._held:
            return self._computed[name].rows(wanted)
        return self[name][wanted].float()

    def release(self, name: str) -> None:
        """Say that ``name`` has been used: its file pages leave memory, and are read again when needed."""
        if self._on_use is not None:
            self._on_use(name, self._tensors[name].numel())
        self._held.pop(name, None)
        if name in self._computed:
            self._computed[name].release()
        else:
            drop_pages(self._tensors[name], self._mapped)


def drop_pages(tensor: torch.Tensor, mapped: Sequence[tuple[int, int]] | None = None) -> None:
    """Take a mapped tensor's pages out of memory; they come back from the file when it is read again.

    Args:
        tensor: any; nothing is done to one that is not mapped.
        mapped: ranges of addresses into which files are mapped, where they are known.
    """
    start = tensor.data_ptr()
    stop = start + tensor.numel() * tensor.element_size()
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    last = stop // mmap.PAGESIZE * mmap.PAGESIZE
    if last <= first:
        return
    # Only clean pages of a file may be dropped: anonymous memory would come back as zeros.
    ranges = _mapped_safetensors() if mapped is None else mapped
    if any(low <= first and last <= high for low, high in ranges) and not _changed(first, last):
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(first), ctypes.c_size_t(last - first), ctypes.c_int(_MADV_DONTNEED)
        )


def _changed(first: int, last: int) -> bool:
    """Whether a page of a private mapping was written to, so that dropping it would lose the change.

    Such a page is private memory of the process and no longer the file's. True also where it is not known.

    Source: bits 61 (page of a file) and 63 (present) of an entry, admin-guide/mm/pagemap.rst of Linux.
    """
    count = (last - first) // mmap.PAGESIZE
    try:
        with Path("/proc/self/pagemap").open("rb", buffering=0) as file:
            file.seek(first // mmap.PAGESIZE * 8)
            entries = np.frombuffer(file.read(count * 8), np.uint64)
    except OSError:
        return True
    swapped, present, of_file = (entries >> np.uint64(bit) & np.uint64(1) for bit in (62, 63, 61))
    return len(entries) < count or bool((((swapped | present) == 1) & (of_file == 0)).any())


def _mapped_safetensors() -> list[tuple[int, int]]:
    """Address ranges into which this process has mapped safetensors files (Linux; else none)."""
    ranges = []
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        fields = line.split(maxsplit=5)
        # Hub caches name the mapped file by its hash: any private file mapping of data will do.
        if len(fields) == 6 and fields[5].startswith("/") and "x" not in fields[1] and fields[4] != "0":
            low, high = (int(address, 16) for address in fields[0].split("-"))
            ranges.append((low, high))
    return ranges
