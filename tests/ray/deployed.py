"""The tests of the server, asked of Ray Serve: ``pytest -p tests.ray.deployed tests/serve``.

One application runs behind Ray's own proxy, router and replica, and holds the server of each ``serving(...)``
at a loopback address of its own. Tests that look into the server's process cannot ask one in another
process: ``apart.py`` names each of them with the reason.
"""

from __future__ import annotations

import asyncio
import io
import logging
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
import ray
from ray import cloudpickle, serve

import qrun
from qrun.model import Model
from qrun.sampling.constraint import Grammars
from qrun.scaling import proxy
from qrun.scaling.cluster import join
from qrun.serve import server
from qrun.serve.app import create_app
from qrun.serve.models import Models
from qrun.serve.state import ServerState
from qrun.text.chat_template import ChatTemplate
from tests.fakes import REPOSITORY, FakeSession
from tests.ray.apart import APART, stale
from tests.serve import serving as local

NAME = "servers"
HEAD_SECONDS = 2.0  # for a request's head, for all tests


class _Packer(cloudpickle.Pickler):
    """Sends a test's model to the process that serves it: a fake one's rule, a real one's folder."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Model) and not isinstance(obj.session, FakeSession):
            return _opened, (obj.manifest.folder, obj.speculate)
        if type(obj) is MappingProxyType:
            return MappingProxyType, (dict(obj),)
        if type(obj) is Grammars:
            return Grammars, (obj._vocabulary,)
        if type(obj) is ChatTemplate:
            return ChatTemplate, ({"default": obj.source}, {})
        return super().reducer_override(obj)


def prepared() -> list[Any]:
    """Called in Ray's proxy before it listens: what ``qrun deploy`` has called there, with less patience."""
    server.HEAD_SECONDS = HEAD_SECONDS
    return proxy.prepared()


def _opened(folder: Path, speculate: bool) -> Model:
    model = qrun.open(folder, threads=1)
    model.speculate = speculate
    return model


def packed(value: Any) -> bytes:
    """A value for another process."""
    with io.BytesIO() as buffer:
        _Packer(buffer).dump(value)
        return buffer.getvalue()


class _Faults(logging.Handler):
    """Keeps what the server logs as a fault."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info or record.levelno >= logging.ERROR:
            self.found.append(logging.Formatter().format(record))


@serve.ingress()
class Servers:
    """The servers of all tests; a request goes to the one whose address it has come to."""

    def __init__(self) -> None:
        self._servers: dict[str, tuple[ServerState, Any]] = {}
        self._faults = _Faults()
        for name in ("qrun", "uvicorn.error"):
            logger = logging.getLogger(name)
            logger.addHandler(self._faults)
            logger.setLevel(logging.INFO)

    async def __serve_build_asgi_app__(self) -> Any:
        async def answer(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "http":
                _, app = self._servers[scope["server"][0]]
                await app(scope, receive, send)

        return answer

    async def open(self, address: str, given: bytes) -> None:
        """Begin to answer at an address."""
        models, options = cloudpickle.loads(given)
        state = await asyncio.to_thread(lambda: local.state_of(models, **options))
        self._servers[address] = state, create_app(state)

    async def close(self, address: str) -> None:
        """End the server of an address."""
        state, _ = self._servers.pop(address)
        await asyncio.to_thread(state.models.close)

    async def faults(self) -> list[str]:
        """What was logged as a fault since it was asked the last time."""
        found, self._faults.found = self._faults.found, []
        return found


class Cluster:
    """A cluster of this machine with the application, started when the first server is asked for."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._port = 0
        self._hosts = count(2)

    @contextmanager
    def serving(self, models: Mapping[str, Model] | Models, **options: Any) -> Iterator[str]:
        """What ``tests.serve.serving.serving`` is there."""
        assert not isinstance(models, Models), "its engines run in the test's process"
        given = packed((dict(models), options))
        self._start()
        host = f"127.0.0.{next(self._hosts) % 250 + 2}"
        self._handle.open.remote(host, given).result(timeout_s=60)
        try:
            yield f"http://{host}:{self._port}"
        finally:
            self._handle.close.remote(host).result(timeout_s=60)

    def faults(self) -> list[str]:
        """See ``Servers.faults``."""
        return [] if self._handle is None else self._handle.faults.remote().result(timeout_s=60)

    def _start(self) -> None:
        if self._handle is not None:
            return
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        paths = [str(REPOSITORY), str(REPOSITORY / "runtime"), *sys.path]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        os.environ["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] = f"{__name__}:{prepared.__name__}"
        join("local", proxy.variables())
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        serve.start(proxy_location="HeadOnly", http_options={"host": "0.0.0.0", "port": self._port})
        made = serve.deployment(Servers, name=NAME).options(max_ongoing_requests=1000)  # as in deployment_of
        self._handle = serve.run(made.bind(), name=NAME, route_prefix="/")

    def end(self) -> None:
        """Take it down."""
        if self._handle is not None:
            serve.shutdown()
            ray.shutdown()


CLUSTER = Cluster()
local.elsewhere = CLUSTER.serving


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    names = {item.nodeid.partition("[")[0] for item in items}
    if left := stale(names):
        raise pytest.UsageError(f"tests/ray/apart.py names what is no test: {', '.join(left)}")
    for item in items:
        name = item.nodeid.partition("[")[0]
        reason = APART.get(name) or APART.get(name.partition("::")[0])
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _no_fault(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests that look into the log for faults do so in the test's own process, where the server is not."""
    if "caplog" not in request.fixturenames:
        yield
        return
    CLUSTER.faults()
    yield
    assert CLUSTER.faults() == []


def pytest_unconfigure() -> None:
    CLUSTER.end()
