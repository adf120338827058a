"""A queue in which clients take turns, so that one with many requests does not hold up the others."""

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
        """Add an item; a client without items in the queue gets its turn after all who have some."""
        self._lines.setdefault(client, deque()).append(item)

    def get(self) -> Item:
        """Take the next item; its client's next turn comes after those of all others.

        Raises:
            IndexError: the queue is empty.
        """
        if not self._lines:
            raise IndexError("nobody waits")
        client, line = self._lines.popitem(last=False)
        item = line.popleft()
        if line:
            self._lines[client] = line
        return item

    def remove(self, unwanted: Callable[[Item], bool]) -> list[Item]:
        """Take out all items that ``unwanted`` chooses, and return them."""
        found = [item for item in self if unwanted(item)]
        if found:
            kept = {
                client: deque(item for item in line if not unwanted(item))
                for client, line in self._lines.items()
            }
            self._lines = OrderedDict((client, line) for client, line in kept.items() if line)
        return found
