"""Streams over HTTP: signs of life amid silence, and answers that end when their client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

from starlette.requests import Request

Result = TypeVar("Result")


class Silence:
    """Tells whenever nothing has been heard for so many seconds; ``close`` ends it.

    One timer that looks back, and not one that is set anew for each token: that would cost more than the
    token's own way to the client.
    """

    def __init__(self, seconds: float, tell: Callable[[], None]) -> None:
        self._seconds, self._tell = seconds, tell
        self._loop = asyncio.get_running_loop()
        self._heard = self._loop.time()
        self._timer = self._loop.call_later(seconds, self._look)

    def heard(self) -> None:
        """Something has come."""
        self._heard = self._loop.time()

    def close(self) -> None:
        """Tell nothing any more."""
        self._timer.cancel()

    def _look(self) -> None:
        now = self._loop.time()
        if now - self._heard >= self._seconds:
            self._tell()
            self._heard = now
        self._timer = self._loop.call_at(self._heard + self._seconds, self._look)


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


async def unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """The result of ``work``, which is cancelled when the client goes away. The body has been read before.

    Raises:
        ClientGoneError: it went away.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return await task
    finally:
        for each in (task, watcher):
            if not each.done():
                each.cancel()
                with suppress(asyncio.CancelledError):
                    await each


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
