"""One load client, the same for every server: streamed completions over HTTP, one after the other.

Prompts are token ids, so that every server reads the same, whatever its tokenizer.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import httpx

# Ids of ordinary tokens in Qwen2's vocabulary.
_LEAST, _MOST = 1_000, 100_000


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


async def ask(client: httpx.AsyncClient, model: str, ids: Sequence[int], tokens: int) -> Request:
    """One streamed completion.

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
    started, first, usage = perf_counter(), 0.0, {}
    async with client.stream("POST", "/v1/completions", json=asked) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code}: {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            usage = chunk.get("usage") or usage
            if not first and chunk.get("choices") and chunk["choices"][0].get("text"):
                first = perf_counter()
    ended = perf_counter()
    if not usage:
        raise RuntimeError("the stream ended without its usage")
    return Request(
        (first or ended) - started, ended - started, usage["prompt_tokens"], usage["completion_tokens"]
    )


async def _all_clients(url: str, model: str, load: Load, seed: int) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=load.clients)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

        async def work(who: int) -> list[Request]:
            seeds = [1_000_000 * seed + 1_000 * who + number for number in range(load.requests)]
            return [await ask(client, model, prompt(load, each), load.tokens) for each in seeds]

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
