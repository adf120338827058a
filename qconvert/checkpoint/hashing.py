"""SHA-256 of the checkpoint's files, computed beside the work that needs no hashes yet."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event

_READ_BYTES = 4 << 20


def hash_files(paths: Iterable[Path], stopped: Callable[[], bool] = lambda: False) -> dict[str, str]:
    """SHA-256 in hexadecimal by file name.

    Args:
        paths: the files.
        stopped: asked after every 4 MiB.

    Raises:
        CancelledError: ``stopped`` said yes.
    """
    digests = {}
    for path in paths:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(_READ_BYTES):
                if stopped():
                    raise CancelledError
                digest.update(block)
        digests[path.name] = digest.hexdigest()
    return digests


@contextmanager
def hashed_meanwhile(paths: Iterable[Path]) -> Iterator[Future[dict[str, str]]]:
    """Another thread hashes the files. It stops on the way out, so an error or Ctrl-C waits for nothing."""
    left = Event()
    with ThreadPoolExecutor(1, thread_name_prefix="hash") as background:
        hashes = background.submit(hash_files, paths, left.is_set)
        try:
            yield hashes
        finally:
            left.set()
