"""A server on a real socket, in a thread of the test's own process."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import httpx

from qrun.engine import Engine
from qrun.model import Model
from qrun.serve.models import Models
from qrun.serve.server import bind, make_server
from qrun.serve.state import ServerState

KEY = "sk-test"
# In place of ``serving``: tests/ray/deployed.py has servers behind Ray Serve.
elsewhere: Callable[..., AbstractContextManager[str]] | None = None


def state_of(
    models: Mapping[str, Model] | Models,
    *,
    slots: int = 4,
    queue: int = 64,
    prefix_bytes: int = 0,
    suffix_tokens: int = 10_000,
    **state: Any,
) -> ServerState:
    """What a server over these models needs."""
    if not isinstance(models, Models):
        limits = {name: state.get(name) for name in ("max_tokens", "max_seconds")}
        options = {"slots": slots, "queue": queue, "prefix_bytes": prefix_bytes, **limits}
        options["suffix_tokens"] = suffix_tokens
        models = Models.of({name: Engine(model, **options) for name, model in models.items()})
    return ServerState(models, **state)


@contextmanager
def serving(models: Mapping[str, Model] | Models, **options: Any) -> Iterator[str]:
    """The address of a server over these models; at the end every thread of it is gone.

    Options are those of ``state_of``.
    """
    if elsewhere is not None:
        with elsewhere(models, **options) as address:
            yield address
        return
    state = state_of(models, **options)
    with bind("127.0.0.1", 0) as listening:
        server = make_server(state, drain_seconds=5)
        thread = Thread(target=lambda: server.run(sockets=[listening]))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)
            state.models.close()
            assert not thread.is_alive()


@contextmanager
def serve_process(
    arguments: Sequence[str], log: Path, *, folder: Path | None = None
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`qrun serve` on a free port as a process of its own, and its address."""
    command = [sys.executable, "-m", "qrun.cli", "serve", *arguments, "--port", "0"]
    with log.open("w") as file:
        process = subprocess.Popen(command, stderr=file, text=True, cwd=folder)
    try:
        found: list[str] = []

        def listening() -> bool:
            assert process.poll() is None, log.read_text()
            found[:] = re.findall(r"listening on (http://\S+)", log.read_text())
            return bool(found)

        until(listening, 120)
        yield process, found[0]
    finally:
        process.kill()
        process.wait()


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for something that another thread does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.005)


def metric(address: str, name: str) -> float:
    """What /metrics tells under a name, of one model."""
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    return float(next(line.split()[-1] for line in lines if line.startswith(f"{name}{{")))


def ready(address: str) -> dict:
    """What /ready tells."""
    return httpx.get(f"{address}/ready").json()["models"]
