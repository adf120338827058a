"""One ledger of memory for every KV cache of the process, and for models that are opened on demand.

Pages of a zeroed array are taken when they are first written, so the memory that the machine reports as free
still counts what earlier caches were promised. The ledger takes that off: two caches cannot both be given the
same free memory.
"""

from __future__ import annotations

from collections.abc import Callable
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

        @property
        def held_bytes(self) -> int:
            """Bytes of the machine's memory that it was promised, written or not."""
            ...


class Ledger:
    """Who was promised how much memory of the machine.

    Attributes:
        lock: to be held from asking for free memory to having taken it.
        limit: bytes that all holders may have together; None is all that the machine has.
        give_way: gives memory back that is held but not in use, and returns whether there was any. Called
            with the lock held, before somebody is refused.
    """

    def __init__(self) -> None:
        self.lock = RLock()
        self.limit: int | None = None
        self.give_way: Callable[[], bool] = lambda: False
        self._holders: WeakSet[Promised] = WeakSet()

    def enter(self, holder: Promised) -> None:
        """Count what ``holder`` was promised, for as long as it lives."""
        self._holders.add(holder)

    def free_bytes(self, holder: Promised) -> int | None:
        """Memory that can be promised to ``holder``, or None where neither the machine nor ``limit`` tells.

        What it was promised before does not count, since the new memory will replace it.
        """
        others = [other for other in list(self._holders) if other is not holder]
        available, found = available_memory(), []
        if available is not None:
            found.append(available - sum(other.untouched_bytes for other in others))
        if self.limit is not None:
            found.append(self.limit - sum(other.held_bytes for other in others))
        return max(0, min(found)) if found else None


LEDGER = Ledger()
