"""A queue in which nobody who asks much makes others wait: clients take turns."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """First in, first out for each client, and one client after the other. Not safe for several threads."""

    def __init__(self) -> None:
        self._lines: OrderedDict[str, deque[Item]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[Item]:
        for line in self._lines.values():
            yield from line

    def put(self, client: str, item: Item) -> None:
        """Stand in line; a client that has nothing waiting comes after those that have."""
        self._lines.setdefault(client, deque()).append(item)

    def get(self) -> Item:
        """The next one; its client goes behind all others.

        Raises:
            IndexError: nobody waits.
        """
        if not self._lines:
            raise IndexError("nobody waits")
        client, line = self._lines.popitem(last=False)
        item = line.popleft()
        if line:
            self._lines[client] = line
        return item

    def remove(self, unwanted: Callable[[Item], bool]) -> list[Item]:
        """Take out those who need not wait any more."""
        found = [item for item in self if unwanted(item)]
        if found:
            kept = {
                client: deque(item for item in line if not unwanted(item))
                for client, line in self._lines.items()
            }
            self._lines = OrderedDict((client, line) for client, line in kept.items() if line)
        return found
