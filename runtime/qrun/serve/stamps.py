"""Ids and times of answers: unlike all others, or the same whenever the same is asked."""

from __future__ import annotations

import hashlib
import time
import uuid


class Stamps:
    """Ids that no other answer has, and the time of day."""

    def key(self) -> str:
        """32 hexadecimal digits, other ones at each call."""
        return uuid.uuid4().hex

    def now(self) -> int:
        """Seconds since 1970."""
        return int(time.time())


class RepeatableStamps(Stamps):
    """Ids that follow from ``seed``, in the order in which they are asked for; the time is 0.

    So that an answer that is made again, after a job was killed, is the same to the byte.
    """

    def __init__(self, seed: str) -> None:
        self._seed, self._count = seed, 0

    def key(self) -> str:
        self._count += 1
        return hashlib.sha256(f"{self._seed}\n{self._count}".encode()).hexdigest()[:32]

    def now(self) -> int:
        return 0
