"""One ledger of memory for every KV cache of the process.

Pages of a zeroed array are taken when they are first written, so the memory that the machine reports as free
still counts what earlier caches were promised. The ledger takes that off: two caches cannot both be given the
same free memory.
"""

from __future__ import annotations

from threading import RLock
from typing import TYPE_CHECKING
from weakref import WeakSet

from qrun.machine import available_memory

if TYPE_CHECKING:
    from typing import Protocol

    class Promised(Protocol):
        """A holder of memory."""

        @property
        def untouched_bytes(self) -> int:
            """Bytes that it was promised and has not written yet."""
            ...


class Ledger:
    """Who was promised how much memory of the machine.

    Attributes:
        lock: to be held from asking for free memory to having taken it.
    """

    def __init__(self) -> None:
        self.lock = RLock()
        self._holders: WeakSet[Promised] = WeakSet()

    def enter(self, holder: Promised) -> None:
        """Count what ``holder`` was promised, for as long as it lives."""
        self._holders.add(holder)

    def free_bytes(self, holder: Promised) -> int | None:
        """Memory that can be promised to ``holder``, or None where the machine does not tell.

        What it was promised before does not count, since the new memory will replace it.
        """
        available = available_memory()
        if available is None:
            return None
        promised = sum(other.untouched_bytes for other in list(self._holders) if other is not holder)
        return max(0, available - promised)


LEDGER = Ledger()
