"""The server under clients that behave badly, for as long as one likes; see ``make soak``.

    python -m tests.serve.soak FOLDER --seconds 600

Sixteen clients chat, stream slowly, call tools, score prompts, break off, send garbage and exceed limits,
while the server is killed and started again some times. At the end nothing of them may be left: no slot, no
place in the queue, no memory that still grows a minute after the start; and every request that was not cut
off has its answer.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from threading import Event, Lock, Thread

import httpx
import psutil

CLIENTS = 16
SLOTS = 4
WARM_SECONDS = 60  # until caches, pools and allocators have what they need
CHAT = "/v1/chat/completions"


class Server:
    """The process, killed and started again on one port."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._folder = folder
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "qrun.cli", "serve", "--engine", f"m={self._folder}"]
        command += ["--port", str(self.port), "--slots", str(SLOTS), "--queue", "8", "--threads", "1"]
        command += ["--prefix-cache-bytes", "2000000", "--max-body-mb", "0.1"]
        self.process = subprocess.Popen(command, stderr=self._log)
        while True:
            assert self.process.poll() is None, "the server has ended by itself"
            try:
                if httpx.get(f"http://127.0.0.1:{self.port}/ready").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.05)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def log(self) -> str:
        self._log.seek(0)
        return self._log.read()


class Client(Thread):
    """Does one thing after the other, at random, until it is told to stop."""

    def __init__(self, number: int, port: int, over: Event, told: Counter[str], lock: Lock) -> None:
        super().__init__()
        self._random = random.Random(number)
        self._port, self._over, self._told, self._lock = port, over, told, lock

    def run(self) -> None:
        doings = (self.chat, self.chat, self.stream_slowly, self.call, self.score)
        doings += (self.break_off, self.garbage, self.exceed)
        with httpx.Client(base_url=f"http://127.0.0.1:{self._port}", timeout=60) as client:
            while not self._over.is_set():
                doing = self._random.choice(doings)
                try:
                    found = doing(client)
                except (httpx.TransportError, OSError):
                    found = "cut off by a kill"
                    self._over.wait(0.2)
                except AssertionError as error:  # it would end this thread, and nobody would notice
                    found = f"wrong: {str(error)[:300]}"
                with self._lock:
                    self._told[f"{doing.__name__}: {found}"] += 1

    def asked(self, **more: object) -> dict[str, object]:
        words = " ".join(self._random.choice(["one", "two", "three", "four", "five"]) for _ in range(30))
        return {
            "model": "m",
            "messages": [{"role": "user", "content": words}],
            "max_tokens": self._random.randint(1, 30),
            "ignore_eos": True,
            **more,
        }

    def later(self, response: httpx.Response) -> str | None:
        """What a client is told that may come again: the queue is full, or the server has just started."""
        if response.status_code not in (429, 503):
            return None
        error = json.loads(response.read())["error"]
        time.sleep(0.1)
        if response.status_code == 429:
            return "429"
        # Anthropic's shape of an error has no code, so the words tell.
        return "loading" if "is being loaded" in error["message"] else f"503 {error['message']}"

    def chat(self, client: httpx.Client) -> str:
        asked = self.asked()
        response = client.post(CHAT, json=asked)
        if (later := self.later(response)) is not None:
            return later
        assert response.status_code == 200, response.text
        assert response.json()["usage"]["completion_tokens"] == asked["max_tokens"]
        return "answered"

    def stream_slowly(self, client: httpx.Client) -> str:
        with client.stream("POST", CHAT, json=self.asked(stream=True)) as response:
            if (later := self.later(response)) is not None:
                return later
            lines = []
            for line in response.iter_lines():
                lines.append(line)
                time.sleep(0.01)
        return "answered" if "data: [DONE]" in lines else "not ended"

    def call(self, client: httpx.Client) -> str:
        """A call that a grammar enforces, through Anthropic's API, as a stream."""
        tool = {"name": "clock", "input_schema": {"type": "object", "additionalProperties": False}}
        choice = {"type": "any", "disable_parallel_tool_use": True}
        asked = self.asked(tools=[tool], tool_choice=choice, stream=True, max_tokens=300)
        del asked["ignore_eos"]
        with client.stream("POST", "/v1/messages", json=asked) as response:
            if (later := self.later(response)) is not None:
                return later
            text = "".join(response.iter_text())
        return "answered" if "tool_use" in text and "message_stop" in text else "not ended"

    def score(self, client: httpx.Client) -> str:
        words = self.asked()["messages"][0]["content"]  # type: ignore[index]
        prompts = [words, words[:20]]
        asked = {"model": "m", "prompt": prompts, "echo": True, "logprobs": 1, "max_tokens": 0}
        response = client.post("/v1/completions", json=asked)
        if (later := self.later(response)) is not None:
            return later
        assert response.status_code == 200, response.text
        found = [len(choice["logprobs"]["tokens"]) for choice in response.json()["choices"]]
        assert found == list(map(len, prompts)), "a letter is a token of this model"
        return "answered"

    def break_off(self, client: httpx.Client) -> str:
        with client.stream("POST", CHAT, json=self.asked(stream=True, max_tokens=150)) as response:
            for _ in zip(range(self._random.randint(0, 5)), response.iter_lines()):
                pass
        return "broken off"

    def garbage(self, client: httpx.Client) -> str:
        body = bytes(self._random.randrange(256) for _ in range(self._random.randint(0, 300)))
        with socket.create_connection(("127.0.0.1", self._port), timeout=10) as connection:
            connection.sendall(body)
        response = client.post(CHAT, content=body)
        return self.later(response) or f"{response.status_code}"

    def exceed(self, client: httpx.Client) -> str:
        long = self.asked(messages=[{"role": "user", "content": "x " * 40_000}])
        many = self.asked(n=99)
        response = client.post(CHAT, json=self._random.choice((long, many)))
        return self.later(response) or f"{response.status_code}"


def soak(folder: Path, seconds: float, kills: int) -> list[str]:
    """What was told and measured, line by line.

    Raises:
        AssertionError: something is left, or somebody was not answered.
    """
    server, over, told, lock = Server(folder), Event(), Counter[str](), Lock()
    clients = [Client(number, server.port, over, told, lock) for number in range(CLIENTS)]
    for client in clients:
        client.start()
    memory: list[tuple[float, float]] = []
    threads: list[int] = []
    for part in range(kills + 1):
        begun = time.monotonic()
        end = begun + seconds / (kills + 1)
        while time.monotonic() < end:
            time.sleep(min(2.0, seconds / 50))
            assert server.process.poll() is None, server.log()[-3000:]
            if part == kills:
                process = psutil.Process(server.process.pid)
                memory.append((time.monotonic() - begun, process.memory_info().rss / 1e6))
                threads.append(process.num_threads())
        if part < kills:
            server.kill()
            server.start()
    over.set()
    for client in clients:
        client.join()
    address = f"http://127.0.0.1:{server.port}"
    for _ in range(100):
        left = httpx.get(f"{address}/ready").json()["models"]["m"]
        if left == {"slots": SLOTS, "active": 0, "queued": 0}:
            break
        time.sleep(0.1)
    gauges = dict(re.findall(r"^(qrun_\w+){model=\"m\"} (\S+)$", httpx.get(f"{address}/metrics").text, re.M))
    in_use = {
        name: float(gauges[name]) for name in ("qrun_active_slots", "qrun_queued_requests", "qrun_model_uses")
    }
    half = len(threads) // 2
    running, before = psutil.Process(server.process.pid).num_threads(), max(threads[: half + 1])
    server.process.terminate()
    code = server.process.wait(60)
    log = server.log()
    warm = [used for when, used in memory if when > WARM_SECONDS]
    middle, late = max(warm[: len(warm) // 2], default=0.0), max(warm[len(warm) // 2 :], default=0.0)
    lines = [f"{count:6,} {what}" for what, count in sorted(told.items())]
    lines += [
        f"left: {left}; {running} threads, {before} at most in the first half; exit code {code}; "
        f"{kills} kills; {sum(told.values()):,} requests",
        f"resident from a minute after the last start on: {middle:.1f} MB at most, then {late:.1f} MB"
        if warm
        else "resident: not judged, the last part is too short",
    ]
    assert left == {"slots": SLOTS, "active": 0, "queued": 0}
    assert not any(in_use.values()), in_use
    assert running <= before + 2, f"threads are left: {threads}"
    assert code == 0
    assert "Traceback" not in log, log[-3000:]
    assert not any("not ended" in what or ": 5" in what or ": wrong" in what for what in told), told
    assert late <= 1.05 * middle + 2, f"memory grows: {memory}"
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.serve.soak", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="a model folder; without it, a tiny random one")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--kills", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or _tiny(Path(scratch))
        print("\n".join(soak(folder, arguments.seconds, arguments.kills)))


def _tiny(scratch: Path) -> Path:
    from qconvert.export import ExportOptions, export
    from qconvert.progress import Progress
    from tests.tiny import make_tiny_checkpoint

    source = make_tiny_checkpoint(scratch / "tiny", max_position_embeddings=1024)
    options = ExportOptions(precision="int8", output=scratch / "model", verify=False)
    return export(str(source), options, Progress(quiet=True)).folder


if __name__ == "__main__":
    main()
