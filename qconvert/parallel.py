"""Work on pieces of a tensor in parallel, one thread a piece.

torch splits every single operation over its threads and waits for the slowest at each end. Packing is
many short operations: on a machine with other work those waits made an export 15 times slower. Threads
that each take whole pieces do not wait for one another.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager

from qrun.machine import usable_cores


@contextmanager
def piece_workers() -> Iterator[Executor]:
    """A pool with a thread for each usable core; torch runs single-threaded within it."""
    with _threads(1), ThreadPoolExecutor(usable_cores(), thread_name_prefix="pack") as pool:
        yield pool


@contextmanager
def all_threads(but: int = 0) -> Iterator[None]:
    """In this thread torch itself takes all usable cores but some, for one large operation."""
    with _threads(max(1, usable_cores() - but)):
        yield


@contextmanager
def single_threads() -> Iterator[None]:
    """torch is single-threaded, unless in ``all_threads``."""
    with _threads(1):
        yield


@contextmanager
def _threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
