"""A list of prompts answered by `qrun batch`, OpenVINO GenAI's continuous batching and llama-server, in turn.

    python -m benchmarks.batch --out report --qrun FOLDER \\
        --llama-server PROGRAM --gguf FILE --openvino FOLDER --openvino-python PROGRAM

Everybody gets the same token ids and as many new tokens for each, all at once, and may schedule them as it
likes. Counted is the time from the first prompt to the last answer; opening a model, and our measurement of
how many rows are worth it, are told apart. What has been measured is kept in OUT/records, so an interrupted
run goes on where it was; ``--minutes`` ends it by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import monotonic, perf_counter
from typing import Any

from benchmarks.compare.records import Records, StepFailedError
from benchmarks.report import conditions, conditions_text, spread, table
from benchmarks.serving.load import ask
from benchmarks.serving.servers import Server, llama_server, openvino, running

_AIM = 1.3
# Ids of ordinary tokens in Qwen2's vocabulary.
_LEAST, _MOST = 1_000, 100_000
_CONTEXT = 1024  # tokens that a slot of llama-server has room for


@dataclass(frozen=True)
class Prompt:
    """Token ids, and how many new tokens are wanted."""

    ids: list[int]
    new: int


def prompts_of(count: int, seed: int) -> list[Prompt]:
    """100 to 600 random tokens with 32 to 128 new ones, the same for the same seed."""
    drawn = random.Random(seed)  # noqa: S311
    return [
        Prompt(
            [drawn.randrange(_LEAST, _MOST) for _ in range(drawn.randint(100, 600))], drawn.randint(32, 128)
        )
        for _ in range(count)
    ]


def batch_lines(prompts: Sequence[Prompt]) -> str:
    """The list as OpenAI's batch lines."""
    lines = []
    for number, prompt in enumerate(prompts):
        body = {"model": "any", "prompt": prompt.ids, "max_tokens": prompt.new, "temperature": 0}
        asked = {**body, "ignore_eos": True}
        lines.append({"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": asked})
    return "".join(json.dumps(line) + "\n" for line in lines)


def measure_ours(folder: Path, prompts: Sequence[Prompt], threads: int) -> dict[str, Any]:
    """`qrun batch` over the list.

    Raises:
        StepFailedError: it fails, or a line has another number of tokens than was asked.
    """
    with tempfile.TemporaryDirectory() as place:
        source, output = Path(place) / "in.jsonl", Path(place) / "out.jsonl"
        source.write_text(batch_lines(prompts))
        command = [sys.executable, "-m", "qrun.cli", "batch", "--engine", str(folder), str(source)]
        command += ["--output", str(output), "--json", "--threads", str(threads)]
        started = perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        whole = perf_counter() - started
        if done.returncode:
            raise StepFailedError(done.stderr[-500:])
        summary = json.loads(done.stdout)
    facts = {"rows": summary["rows"], "whole_seconds": whole, "note": done.stderr.strip()}
    return _checked(prompts, summary["seconds"], summary["completion_tokens"], facts)


def measure_server(server: Server, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """A server over the list, all of it in flight at once.

    Raises:
        StepFailedError: it refuses one, or gives another number of tokens than was asked.
    """

    async def all_at_once(url: str) -> tuple[float, int]:
        started = perf_counter()
        found = await asyncio.gather(*(ask(url, "model", each.ids, each.new) for each in prompts))
        return perf_counter() - started, sum(each.tokens for each in found)

    try:
        with running(server) as url:
            asyncio.run(ask(url, "model", prompts[0].ids[:64], 4))  # to warm up
            seconds, tokens = asyncio.run(all_at_once(url))
    except (RuntimeError, OSError) as error:
        raise StepFailedError(str(error)) from error
    return _checked(prompts, seconds, tokens, {})


def _checked(prompts: Sequence[Prompt], seconds: float, tokens: int, facts: dict[str, Any]) -> dict[str, Any]:
    wanted = sum(prompt.new for prompt in prompts)
    if tokens != wanted:
        raise StepFailedError(f"{tokens} new tokens and not {wanted}")
    return {"seconds": seconds, "new": tokens, "read": sum(len(each.ids) for each in prompts), **facts}


@dataclass(frozen=True)
class Contender:
    """Somebody who answers the list.

    Attributes:
        title: for people.
        ours: whether it is `qrun batch`.
        settings: what it was started with.
        work: answers a list.
    """

    title: str
    ours: bool
    settings: str
    work: Callable[[Sequence[Prompt]], dict[str, Any]]


def contenders_of(arguments: argparse.Namespace) -> list[Contender]:
    threads, found = arguments.threads, []
    for folder in arguments.qrun:

        def ours(prompts: Sequence[Prompt], folder: Path = folder) -> dict[str, Any]:
            return measure_ours(folder, prompts, threads)

        found.append(Contender(f"qrun batch {folder.name}", True, f"--threads {threads}", ours))
    servers = [
        llama_server(arguments.llama_server, each, arguments.llama_slots, threads, _CONTEXT)
        for each in arguments.gguf
    ]
    if arguments.openvino:
        servers.append(
            openvino(arguments.openvino_python, arguments.openvino, arguments.openvino_slots, threads)
        )
    for server in servers:

        def theirs(prompts: Sequence[Prompt], server: Server = server) -> dict[str, Any]:
            return measure_server(server, prompts)

        found.append(Contender(server.title, False, server.facts["options"], theirs))
    return found


def key_of(contender: Contender, arguments: argparse.Namespace, number: int) -> dict[str, Any]:
    """What makes a measurement this one and no other."""
    return {
        **{"peer": contender.title, "round": number, "settings": contender.settings},
        **{"prompts": arguments.prompts, "threads": arguments.threads},
    }


def report(
    arguments: argparse.Namespace, contenders: Sequence[Contender], records: Records, facts: dict[str, Any]
) -> str:
    """Tables of rates, and ours by the best peer's in each round."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for contender in contenders:
        keys = {number: key_of(contender, arguments, number) for number in range(1, arguments.rounds + 1)}
        kept = {number: records.read("batch", key) for number, key in keys.items()}
        found[contender.title] = {n: each for n, each in kept.items() if each and "failed" not in each}
    rates = {
        title: {number: each["new"] / each["seconds"] for number, each in kept.items()}
        for title, kept in found.items()
    }
    rows = []
    for contender in contenders:
        kept = found[contender.title]
        if not kept:
            rows.append([contender.title, contender.settings, "not measured", "", ""])
            continue
        both = [(each["new"] + each["read"]) / each["seconds"] for each in kept.values()]
        rows.append(
            [
                *(contender.title, contender.settings, str(next(iter(kept.values())).get("rows", ""))),
                *(spread(list(rates[contender.title].values())), spread(both, 0)),
            ]
        )
    peers = [each for each in contenders if not each.ours and rates[each.title]]
    aims = []
    for contender in (each for each in contenders if each.ours and rates[each.title]):
        for peer in peers:
            mine, theirs = rates[contender.title], rates[peer.title]
            times = [mine[number] / theirs[number] for number in sorted(mine.keys() & theirs.keys())]
            if times:
                reached = "yes" if median(times) >= _AIM else "**no**"
                aims.append([contender.title, peer.title, spread(times, 2), f"{_AIM}", reached])
    text = (
        f"# A list of prompts: Qwen2.5's {arguments.shape} shape, random weights\n\n"
        f"{conditions_text(facts)}\n\n"
        f"{arguments.prompts} prompts of 100 to 600 tokens with 32 to 128 new ones, greedy, another list in "
        f"each of {arguments.rounds} rounds, in turn, {arguments.threads} threads each. Medians of the "
        "rounds, their range in brackets. Peers get all prompts at once over HTTP. OpenVINO's continuous "
        "batching stands behind a server that makes no text of its tokens, which flatters it.\n\n"
    )
    head = ["contender", "settings", "rows", "new tokens/s", "tokens/s, read and new"]
    text += table(head, rows)
    return text + "\n\n" + table(["ours", "peer", "times the peer's rate", "aim", "reached"], aims) + "\n"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.batch", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="records and report")
    parser.add_argument("--qrun", type=Path, action="append", default=[], help="a model folder, repeatable")
    parser.add_argument("--llama-server", type=Path, help="the program")
    parser.add_argument("--gguf", type=Path, action="append", default=[], help="for it; may be repeated")
    parser.add_argument("--llama-slots", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument("--openvino", type=Path, help="a folder that optimum-intel has written")
    parser.add_argument("--openvino-python", type=Path, default=sys.executable, help="has openvino-genai")
    parser.add_argument("--openvino-slots", type=int, default=256, help="at most (default: %(default)s)")
    parser.add_argument("--shape", default="0.5B", help="for the report's title (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=200, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin nothing after so long")
    parser.add_argument("--retry-failed", action="store_true", help="try again what has failed before")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    until = monotonic() + 60 * arguments.minutes
    contenders = contenders_of(arguments)
    records = Records(arguments.out / "records", retry_failed=arguments.retry_failed)
    for number in range(1, arguments.rounds + 1):
        prompts = prompts_of(arguments.prompts, number)
        turn = number % len(contenders)  # so that nobody always has the machine as the one before leaves it
        for contender in [*contenders[turn:], *contenders[:turn]]:
            if monotonic() > until:
                break
            print(f"round {number}: {contender.title}", flush=True)
            found = records.once(
                "batch",
                key_of(contender, arguments, number),
                partial(contender.work, prompts),
            )
            print({name: value for name, value in found.items() if name not in ("key", "kind")}, flush=True)
    pythons = {"client and qrun": sys.executable}
    if arguments.openvino:
        pythons["OpenVINO"] = str(arguments.openvino_python)
    facts = conditions(pythons)
    (arguments.out / "report.md").write_text(report(arguments, contenders, records, facts))


if __name__ == "__main__":
    main()
