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
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(usable_cores(), thread_name_prefix="pack") as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


@contextmanager
def all_threads() -> Iterator[None]:
    """Within ``piece_workers``: torch itself takes every usable core, for one large operation."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(usable_cores())
    try:
        yield
    finally:
        torch.set_num_threads(threads)
