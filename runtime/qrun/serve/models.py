"""Models by name: opened at the start or when they are first asked for, closed where memory is needed.

A request uses its model from ``use`` to ``release``. A model in use is never closed; of the others the least
recently used one goes first. What each of them takes stands in the ledger of memory, beside the KV caches.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from threading import Lock, Thread
from time import monotonic, perf_counter
from typing import Any, Literal

from qrun.backends.kvcache import MINIMUM_CAPACITY
from qrun.backends.ledger import LEDGER
from qrun.engine import Engine
from qrun.errors import QrunError
from qrun.folder.manifest import Manifest, forecast_bytes
from qrun.machine import give_back_memory
from qrun.serve.errors import ApiError

# A model that could not be opened is tried again by the first request after so many seconds.
TRY_AGAIN_SECONDS = 10.0
State = Literal["unloaded", "loading", "loaded", "unloading", "failed"]

_log = logging.getLogger("qrun.serve")


@dataclass(frozen=True)
class Source:
    """A model that can be opened, and what is known of it before.

    Attributes:
        open: gives an engine that nobody else uses; it may take a minute, and raise ``QrunError``.
        manifest: of its folder.
        slots: that its engine will have.
        weight_bytes: of the files that are read into memory.
        prefix_bytes: what its engine may keep of prompts.
    """

    open: Callable[[], Engine]
    manifest: Manifest
    slots: int
    weight_bytes: int = 0
    prefix_bytes: int = 0

    @property
    def first_bytes(self) -> int:
        """Memory that it needs to answer anything."""
        cache = forecast_bytes(self.manifest, MINIMUM_CAPACITY, self.slots)
        return self.weight_bytes + self.prefix_bytes + cache


@dataclass(eq=False)
class Served:
    """One model of the server.

    Attributes:
        source: how to open it.
        state: "loaded" where it has an engine.
        engine: where it is loaded.
        uses: requests that use it, or wait for it.
        used_at: the number of its last use, among those of all models.
        loads: how often it was opened.
        error: why it could not be opened the last time.
    """

    name: str
    source: Source
    state: State = "unloaded"
    engine: Engine | None = None
    uses: int = 0
    used_at: int = 0
    loads: int = 0
    error: QrunError | None = None
    failed_at: float = 0.0
    opening: asyncio.Future[None] | None = field(default=None, repr=False)

    @property
    def held_bytes(self) -> int:
        """Weights and kept beginnings of prompts, as soon as it is being opened. Its slots count apart."""
        kept = self.source.weight_bytes + self.source.prefix_bytes
        return 0 if self.state in ("unloaded", "failed") else kept

    @property
    def untouched_bytes(self) -> int:
        """The part of ``held_bytes`` that the machine still takes for free."""
        engine = self.engine
        return self.held_bytes if engine is None else max(0, self.source.prefix_bytes - engine.prefix_bytes)

    @property
    def is_idle(self) -> bool:
        """Whether it can be closed without anybody noticing."""
        engine = self.engine
        return engine is not None and not (self.uses or engine.active or engine.queued)


class Models(Mapping[str, Served]):
    """The models of a server.

    Args:
        sources: by the names that clients use, in the order in which they are listed.
        lazy: open each when it is first asked for, and close the least recently used ones where memory is
            needed. Otherwise ``open_all`` opens them, and they stay open.
    """

    def __init__(self, sources: Mapping[str, Source], *, lazy: bool = False) -> None:
        self.lazy = lazy
        self._served = {name: Served(name, source) for name, source in sources.items()}
        self._lock = Lock()  # of states and uses; never held while a model is opened or closed
        self._opens = Lock()  # one model after the other
        self._uses = count(1)
        for served in self._served.values():
            LEDGER.enter(served)
        if lazy:
            LEDGER.give_way = self._close_one

    @classmethod
    def of(cls, engines: Mapping[str, Engine]) -> Models:
        """Models that are open already, and stay so."""
        found = cls({name: _opened(engine) for name, engine in engines.items()})
        for name, engine in engines.items():
            found[name].engine, found[name].state = engine, "loaded"
        return found

    def __getitem__(self, name: str) -> Served:
        return self._served[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._served)

    def __len__(self) -> int:
        return len(self._served)

    @property
    def ready(self) -> bool:
        """Whether requests are taken: all models are loaded, or are opened when they are asked for."""
        return self.lazy or all(each.state == "loaded" for each in self._served.values())

    @property
    def opening(self) -> bool:
        """Whether a model is being opened."""
        return any(each.state == "loading" for each in self._served.values())

    async def open_all(self) -> None:
        """Open them one after the other.

        Raises:
            QrunError: one cannot be opened.
        """
        for served in self._served.values():
            await self._opened(served)
            if served.error is not None:
                raise served.error

    async def use(self, name: str) -> Engine:
        """The engine of a model, which is opened if it is not; call ``release`` once for each use.

        However many ask for it at once, it is opened once, and they all wait.

        Raises:
            ApiError: 503: it cannot be opened, or there is no memory for it now.
        """
        served = self._served[name]
        if served.state != "loaded" and not self.lazy:
            raise ApiError(503, f"the model {name!r} is being loaded: try again", code="model_loading")
        with self._lock:
            served.uses += 1
            served.used_at = next(self._uses)
        try:
            while (engine := served.engine) is None:
                await self._opened(served)
                if served.error is not None:
                    raise _refusal(name, served.error)
        except BaseException:
            self.release(served)
            raise
        return engine

    def release(self, served: Served) -> None:
        """A request that used a model has ended."""
        with self._lock:
            served.uses -= 1

    def close(self, *, drain_seconds: float = 0.0) -> None:
        """Close all that are open."""
        for served in self._served.values():
            if (engine := served.engine) is not None:
                engine.close(drain_seconds=drain_seconds)
        if LEDGER.give_way == self._close_one:
            LEDGER.give_way = lambda: False

    async def _opened(self, served: Served) -> None:
        """Wait until a model has been opened, or could not be, by whoever began with it."""
        failed = served.state == "failed" and monotonic() - served.failed_at < TRY_AGAIN_SECONDS
        if served.engine is not None or failed:
            return
        if served.opening is None:
            loop = asyncio.get_running_loop()
            served.opening = done = loop.create_future()

            def tell() -> None:
                served.opening = None
                done.set_result(None)

            def work() -> None:
                self._open(served)
                with suppress(RuntimeError):  # the server has ended meanwhile, and its loop with it
                    loop.call_soon_threadsafe(tell)

            # A daemon, so that the process can end while a model is being opened.
            Thread(target=work, name="qrun-opening", daemon=True).start()
        await asyncio.shield(served.opening)

    def _open(self, served: Served) -> None:
        started = perf_counter()
        with self._opens:
            try:
                with LEDGER.lock:
                    self._make_room(served)
                    served.error, served.state = None, "loading"
                engine = served.source.open()
            except NoRoomError as error:
                served.error, served.state = error, "unloaded"
                return
            except Exception as error:
                known = isinstance(error, QrunError)
                _log.warning("the model %s cannot be loaded: %s", served.name, error, exc_info=not known)
                served.error = error if isinstance(error, QrunError) else QrunError("the server has a fault")
                served.failed_at, served.state = monotonic(), "failed"
                return
            with self._lock:
                served.engine, served.state = engine, "loaded"
                served.loads += 1
        _tell(served, started)

    def _make_room(self, served: Served) -> None:
        """Close models until there is memory for another one.

        Raises:
            QrunError: the others are in use.
        """
        needed = served.source.first_bytes
        while (free := LEDGER.free_bytes(served)) is not None and free < needed:
            if not LEDGER.give_way():
                busy = ", ".join(each.name for each in self._served.values() if each.engine is not None)
                raise NoRoomError(
                    f"it needs {needed / 1e6:,.0f} MB and {free / 1e6:,.0f} MB of memory are free"
                    + (f"; in use: {busy}" if busy else "")
                )

    def _close_one(self) -> bool:
        """Close the idle model whose last use is the longest ago; False where none is idle.

        Called with the ledger's lock held, by the thread that opens models or by an engine's own.
        """
        with self._lock:
            idle = [each for each in self._served.values() if each.is_idle]
            if not idle:
                return False
            served = min(idle, key=lambda each: each.used_at)
            engine, served.engine, served.state = served.engine, None, "unloading"
        assert engine is not None
        started = perf_counter()
        engine.close()
        del engine
        gc.collect()  # a session may lie in a cycle, and its weights with it
        give_back_memory()
        served.state = "unloaded"
        _tell(served, started)
        return True


def _opened(engine: Engine) -> Source:
    return Source(lambda: engine, engine.model.manifest, engine.slots)


class NoRoomError(QrunError):
    """There is no memory for a model while others are in use."""


def _refusal(name: str, error: QrunError) -> ApiError:
    if isinstance(error, NoRoomError):
        return ApiError(503, f"there is no memory for the model {name!r} now: {error.what}", code="no_memory")
    return ApiError(503, f"the model {name!r} cannot be loaded: {error.what}", code="model_not_loaded")


def _tell(served: Served, started: float) -> None:
    facts: dict[str, Any] = {"model": served.name, "state": served.state}
    _log.info(json.dumps({**facts, "ms": round(1000 * (perf_counter() - started), 1)}, ensure_ascii=False))
