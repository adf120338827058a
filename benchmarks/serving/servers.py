"""The servers that are compared: how each is started, and when it is ready."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from socket import create_server
from time import monotonic, sleep
from typing import Any

import httpx

_SECONDS_TO_START = 120
OPENVINO_SERVER = Path(__file__).resolve().parent.parent / "peers" / "openvino_server.py"


@dataclass(frozen=True)
class Server:
    """One contender.

    Attributes:
        title: for people.
        command: that starts it; ``{port}`` is replaced.
        bits: of its weights: those of equal bits compete.
        ours: whether it is qrun.
        facts: its settings, for the report.
    """

    title: str
    command: tuple[str, ...]
    bits: int = 4
    ours: bool = False
    facts: dict[str, Any] = field(default_factory=dict)


def qrun(engine: Path, slots: int, threads: int, options: tuple[str, ...]) -> Server:
    """`qrun serve`, with its defaults otherwise."""
    command = (sys.executable, "-m", "qrun.cli", "serve", "--engine", f"model={engine}", "--port", "{port}")
    settings = ("--slots", str(slots), "--threads", str(threads), *options)
    return Server(f"qrun {engine.name}", command + settings, ours=True, facts={"options": " ".join(settings)})


def llama_server(program: Path, gguf: Path, slots: int, threads: int, context: int) -> Server:
    """llama.cpp's server, with its defaults otherwise; its context is shared out among the slots."""
    settings = ("-np", str(slots), "-c", str(slots * context), "-t", str(threads), "-tb", str(threads))
    command = (str(program), "-m", str(gguf), "--port", "{port}", "--alias", "model", *settings)
    return Server(f"llama-server {gguf.stem}", command, facts={"options": " ".join(settings)})


def openvino(python: Path, folder: Path, slots: int, threads: int) -> Server:
    """OpenVINO GenAI's continuous batching behind a server that does nothing else."""
    settings = ("--slots", str(slots), "--threads", str(threads))
    command = (str(python), str(OPENVINO_SERVER), str(folder), "--port", "{port}", *settings)
    return Server(f"OpenVINO GenAI {folder.name}", command, facts={"options": " ".join(settings)})


@contextmanager
def running(server: Server) -> Iterator[str]:
    """The address of a server that has answered one health check; it is ended at the end.

    Raises:
        RuntimeError: it has ended by itself, or does not become ready.
    """
    with create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [part.format(port=port) for part in server.command]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True)
        try:
            _wait(process, url, log)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(process: subprocess.Popen[str], url: str, log: Any) -> None:
    until = monotonic() + _SECONDS_TO_START
    while monotonic() < until:
        if process.poll() is not None:
            log.seek(0)
            raise RuntimeError(f"{process.args}: {log.read()[-2000:]}")
        with suppress(httpx.TransportError):
            status = httpx.get(f"{url}/ready").status_code
            if status == 404:  # llama-server has only /health, which says 503 while it loads
                status = httpx.get(f"{url}/health").status_code
            if status == 200:
                return
        sleep(0.1)
    raise RuntimeError(f"{process.args} does not become ready")
