"""A server on a real socket, in a thread of the test's own process."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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


@contextmanager
def serving(
    models: Mapping[str, Model] | Models, *, slots: int = 4, queue: int = 64, **state: Any
) -> Iterator[str]:
    """The address of a server over these models; at the end every thread of it is gone."""
    if not isinstance(models, Models):
        limits = {name: state.get(name) for name in ("max_tokens", "max_seconds")}
        engines = {name: Engine(model, slots=slots, queue=queue, **limits) for name, model in models.items()}
        models = Models.of(engines)
    with bind("127.0.0.1", 0) as listening:
        server = make_server(ServerState(models, **state), drain_seconds=5)
        thread = Thread(target=lambda: server.run(sockets=[listening]))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)
            models.close()
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


def ready(address: str) -> dict:
    """What /ready tells."""
    return httpx.get(f"{address}/ready").json()["models"]
