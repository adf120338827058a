"""One load client, the same for every server: streamed completions over HTTP, one after the other.

Prompts are token ids, so that every server reads the same, whatever its tokenizer.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

# Ids of ordinary tokens in Qwen2's vocabulary.
_LEAST, _MOST = 1_000, 100_000
# A chunk with a text that is not empty, without reading all of its JSON.
_TEXT = re.compile(rb'"text": ?"[^"]')


@dataclass(frozen=True)
class Load:
    """What so many clients ask.

    Attributes:
        clients: at once; each sends its next request when the one before is answered.
        prompt: tokens of a prompt of its own.
        shared: tokens that all prompts begin with.
        tokens: of an answer.
        requests: of each client.
    """

    clients: int
    prompt: int = 256
    shared: int = 0
    tokens: int = 64
    requests: int = 2

    @property
    def name(self) -> str:
        """For people: "8 clients, 1,024 shared"."""
        text = f"{self.clients} client{'s' * (self.clients > 1)}"
        return f"{text}, {self.shared:,} shared" if self.shared else text

    def key(self) -> dict[str, Any]:
        """All of it, for a record."""
        return asdict(self)


@dataclass(frozen=True)
class Request:
    """What one request has shown: seconds to its first text and to its end; tokens as the server counts."""

    first: float
    whole: float
    prompt_tokens: int
    tokens: int


def prompt(load: Load, seed: int) -> list[int]:
    """Random tokens, the same for the same seed."""
    common, own = random.Random(7), random.Random(seed)  # noqa: S311
    drawn = [common.randrange(_LEAST, _MOST) for _ in range(load.shared)]
    return drawn + [own.randrange(_LEAST, _MOST) for _ in range(load.prompt)]


async def ask(url: str, model: str, ids: Sequence[int], tokens: int) -> Request:
    """One streamed completion on a connection of its own.

    The bytes are read by hand: a library for HTTP takes several times as long for each token as the servers
    do, on the same cores.

    Raises:
        RuntimeError: it was refused, or ended without its usage.
    """
    asked = {
        "model": model,
        "prompt": list(ids),
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps(asked).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    started, first, last = perf_counter(), 0.0, b""
    reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 22)
    try:
        writer.write(head.encode() + body)
        status = (await reader.readline()).split()[1:2]
        while line := await reader.readline():
            # Events stand in lines of their own, also in a body that comes in chunks.
            if not line.startswith(b"data: {"):
                continue
            last = line
            if not first and _TEXT.search(line):
                first = perf_counter()
    finally:
        writer.close()
    ended = perf_counter()
    usage = (json.loads(last[6:]) if last else {}).get("usage")
    if status != [b"200"] or not usage:
        raise RuntimeError(f"{status}: the stream ended without its usage: {last[:300]!r}")
    return Request(
        (first or ended) - started, ended - started, usage["prompt_tokens"], usage["completion_tokens"]
    )


async def _all_clients(url: str, model: str, load: Load, seed: int) -> dict[str, Any]:
    async def work(who: int) -> list[Request]:
        seeds = [1_000_000 * seed + 1_000 * who + number for number in range(load.requests)]
        return [await ask(url, model, prompt(load, each), load.tokens) for each in seeds]

    started = perf_counter()
    found = await asyncio.gather(*map(work, range(load.clients)))
    seconds = perf_counter() - started
    requests = [asdict(request) for requests in found for request in requests]
    return {"seconds": seconds, "requests": requests}


def measure(url: str, model: str, load: Load, seed: int) -> dict[str, Any]:
    """One round of a load: its seconds, and every request.

    Raises:
        RuntimeError: a request was refused.
    """
    return asyncio.run(_all_clients(url, model, load, seed))
