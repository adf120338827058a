"""The server as a process: its socket, its signals, its end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import h11
import uvicorn
from uvicorn.config import HTTP_PROTOCOLS
from uvicorn.protocols.http.h11_impl import H11Protocol

from qrun.errors import QrunError
from qrun.serve.app import create_app
from qrun.serve.state import ServerState

# A request's head must have come so many seconds after its connection, or after its first byte.
HEAD_SECONDS = 30.0
_HEAD_BYTES = 64 << 10


class Protocol(H11Protocol):
    """uvicorn's HTTP/1.1, which gives up whoever opens connections, or begins requests, and says no more.

    It is named, since uvicorn would otherwise take another parser where one happens to be installed.
    """

    _late: asyncio.TimerHandle | None = None

    def __init__(self, config: uvicorn.Config, *arguments: Any, **options: Any) -> None:
        config.h11_max_incomplete_event_size = _HEAD_BYTES
        super().__init__(config, *arguments, **options)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.trailing_data[0]:  # the next request has begun already
            self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_watching()

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop_watching()
        elif self._late is None:
            self._late = self.loop.call_later(HEAD_SECONDS, self.timeout_keep_alive_handler)

    def _stop_watching(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


def read_everywhere() -> None:
    """Have every server of uvicorn in this process read requests by ``Protocol``, also those of others."""
    HTTP_PROTOCOLS["auto"] = f"{Protocol.__module__}:{Protocol.__qualname__}"


class _Server(uvicorn.Server):
    """uvicorn's server, which opens models while it serves, and has no signal handlers.

    ``_serve`` has its own: after the first signal running answers are completed, after the second one the
    server ends at once; the exit code is 0 in both cases.

    Attributes:
        failure: why a model could not be opened, which ends the server.
    """

    def __init__(self, config: uvicorn.Config, state: ServerState, when_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.failure: QrunError | None = None
        self._state = state
        self._when_ready = when_ready
        self._opening: asyncio.Task[None] | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._opening = asyncio.create_task(self._open_models())

    async def _open_models(self) -> None:
        try:
            if not self._state.models.lazy:
                await self._state.models.open_all()
        except QrunError as error:
            self.failure, self.should_exit = error, True
        else:
            self._when_ready()


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. It is made before any model is opened, so that a taken port is refused at once.

    Raises:
        QrunError: the address is not this machine's, or the port is taken or not allowed.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise QrunError(
            f"cannot listen on {host}, port {port}: {error.strerror or error}",
            hint="choose another --port (0 takes a free one) or --host",
        ) from error
    found.listen(1024)
    return found


def run(
    state: ServerState,
    listening: socket.socket,
    *,
    drain_seconds: float,
    when_ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGTERM or SIGINT; running answers then have ``drain_seconds`` to be completed.

    Models that are not lazy are opened while the server says 503; ``when_ready`` is called once they are.

    Raises:
        QrunError: one of them cannot be opened.
    """
    asyncio.run(_serve(state, listening, drain_seconds, when_ready))
    if state.models.opening:
        # The thread that opens a model cannot be interrupted, and nothing that it does is worth waiting for.
        sys.stderr.flush()
        os._exit(0)


def make_server(
    state: ServerState, *, drain_seconds: float, when_ready: Callable[[], None] = lambda: None
) -> _Server:
    """The server itself; setting its ``should_exit`` ends it."""
    config = uvicorn.Config(
        create_app(state),
        http=Protocol,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=max(1, round(drain_seconds)),
    )
    return _Server(config, state, when_ready)


async def _serve(
    state: ServerState, listening: socket.socket, drain_seconds: float, when_ready: Callable[[], None]
) -> None:
    server = make_server(state, drain_seconds=drain_seconds, when_ready=when_ready)

    def end() -> None:
        if state.draining:
            server.force_exit = True
        state.draining = True
        server.should_exit = True

    loop = asyncio.get_running_loop()
    for each in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(each, end)
    await server.serve(sockets=[listening])
    await asyncio.to_thread(state.models.close)
    if server.failure is not None:
        raise server.failure


def log_to_stderr() -> None:
    """One line of JSON for each request; faults of ours with their tracebacks."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name, level in (("qrun", logging.INFO), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
