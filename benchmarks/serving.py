"""Load on a server that speaks OpenAI's completions: throughput and waiting times against numbers of clients.

    python -m benchmarks.serving --engine FOLDER                    # starts `qrun serve` and measures it
    python -m benchmarks.serving --url http://127.0.0.1:8081 --model NAME     # any other server

Every client sends one request after the other: a prompt of random words (the same for every server),
streamed, with a fixed number of new tokens (``ignore_eos``; a server that does not know it may end earlier,
and only what it has sent counts). A round is ``--requests`` requests of each client; the first one does not
count.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter, sleep
from typing import Any

import httpx

from benchmarks.report import conditions, conditions_text, publish, table

WORDS = (
    "river",
    "stone",
    "and",
    "the",
    "light",
    "of",
    "seven",
    "houses",
    "near",
    "old",
    "water",
    "runs",
    "to",
)


@dataclass(frozen=True)
class Request:
    """What one request has shown: seconds to its first text and to its end; tokens as the server counts."""

    first: float
    whole: float
    prompt_tokens: int
    tokens: int


def prompt(words: int, seed: int, shared: str = "") -> str:
    """Random words, the same for the same seed."""
    chosen = random.Random(seed)  # noqa: S311
    return shared + " ".join(chosen.choice(WORDS) for _ in range(words))


async def ask(client: httpx.AsyncClient, model: str, text: str, tokens: int) -> Request:
    """One streamed completion."""
    asked = {
        "model": model,
        "prompt": text,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started, first, usage = perf_counter(), 0.0, {}
    async with client.stream("POST", "/v1/completions", json=asked) as response:
        if response.status_code != 200:
            raise SystemExit(f"{response.status_code}: {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            usage = chunk.get("usage") or usage
            if not first and chunk.get("choices") and chunk["choices"][0].get("text"):
                first = perf_counter()
    return Request(
        first - started, perf_counter() - started, usage["prompt_tokens"], usage["completion_tokens"]
    )


async def one_round(
    url: str, arguments: argparse.Namespace, clients: int, number: int
) -> tuple[float, list[Request]]:
    """All clients at once; the seconds that it took, and every request."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:

        async def work(who: int) -> list[Request]:
            seeds = (1_000_000 * number + 1_000 * who + each for each in range(arguments.requests))
            shared = prompt(arguments.shared, 7) + " " if arguments.shared else ""
            return [
                await ask(client, arguments.model, prompt(arguments.words, seed, shared), arguments.tokens)
                for seed in seeds
            ]

        started = perf_counter()
        found = await asyncio.gather(*map(work, range(clients)))
        return perf_counter() - started, [request for requests in found for request in requests]


def measure(url: str, arguments: argparse.Namespace, clients: int) -> dict[str, Any]:
    """Medians over the rounds; the 95th percentile over all requests."""
    rates: list[float] = []
    requests: list[Request] = []
    for number in range(arguments.repeats + 1):
        seconds, found = asyncio.run(one_round(url, arguments, clients, number))
        if number:
            rates.append(sum(each.tokens for each in found) / seconds)
            requests += found
    firsts = [each.first for each in requests]
    between = [(each.whole - each.first) / (each.tokens - 1) for each in requests if each.tokens > 1]
    return {
        "clients": clients,
        "output_tokens_per_second": median(rates),
        "range": [min(rates), max(rates)],
        "first_token_seconds": median(firsts),
        "first_token_seconds_p95": quantiles(firsts, n=20)[-1] if len(firsts) > 1 else firsts[0],
        "seconds_between_tokens": median(between),
        "prompt_tokens": median(each.prompt_tokens for each in requests),
    }


@contextmanager
def served(engine: Path, slots: int, options: list[str]) -> Iterator[str]:
    """`qrun serve` on a free port."""
    command = [sys.executable, "-m", "qrun.cli", "serve", "--engine", f"model={engine}", "--port", "0"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([*command, "--slots", str(slots), *options], stderr=log, text=True)
        try:
            while "listening on " not in (said := _all_of(log)):
                if process.poll() is not None:
                    raise SystemExit(said)
                sleep(0.1)
            yield said.split("listening on ", 1)[1].split()[0]
        finally:
            process.terminate()
            process.wait()


def _all_of(log: Any) -> str:
    log.seek(0)
    found: str = log.read()
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--engine", type=Path, help="a model folder, which `qrun serve` serves")
    parser.add_argument("--url", help="another server, instead")
    parser.add_argument("--model", default="model", help="its name there (default: %(default)s)")
    parser.add_argument("--clients", default="1,2,4,8", help="how many at once (default: %(default)s)")
    parser.add_argument(
        "--words", type=int, default=256, help="of a prompt, a token each (default: %(default)s)"
    )
    parser.add_argument("--shared", type=int, default=0, help="words that all prompts begin with")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer (default: %(default)s)")
    parser.add_argument(
        "--requests", type=int, default=2, help="of a client in a round (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count (default: %(default)s)")
    parser.add_argument("--serve-options", default="", help="more options for `qrun serve`, as one text")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the result there too; - for stdout alone"
    )
    arguments = parser.parse_args()
    if (arguments.engine is None) == (arguments.url is None):
        parser.error("give either --engine or --url")
    return arguments


def main() -> None:
    arguments = parse()
    counts = [int(each) for each in arguments.clients.split(",")]
    if arguments.url:
        results = [measure(arguments.url, arguments, clients) for clients in counts]
    else:
        with served(arguments.engine, max(counts), arguments.serve_options.split()) as url:
            results = [measure(url, arguments, clients) for clients in counts]
    facts = conditions({"client": sys.executable})
    rows = [
        [
            str(each["clients"]),
            f"{each['output_tokens_per_second']:.1f} ({each['range'][0]:.1f} to {each['range'][1]:.1f})",
            f"{1000 * each['first_token_seconds']:,.0f}",
            f"{1000 * each['first_token_seconds_p95']:,.0f}",
            f"{1000 * each['seconds_between_tokens']:.1f}",
        ]
        for each in results
    ]
    head = ["clients", "output tokens/s", "first token, ms", "95th percentile", "between tokens, ms"]
    what = arguments.engine or arguments.url
    text = f"{what}\n\n{table(head, rows)}\n\n{conditions_text(facts)}"
    publish(text, {"benchmark": "serving", "results": results, **facts}, arguments.json)


if __name__ == "__main__":
    main()
