"""What the records of the servers say: tables, ratios to the best peer in each round, charts."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

from benchmarks.compare.records import Records
from benchmarks.report import conditions_text, spread, table
from benchmarks.serving.chart import Line, lines
from benchmarks.serving.load import Load
from benchmarks.serving.servers import Server

_HEAD = ["server", "output tokens/s", "first token, ms", "95th percentile", "tokens/s of one answer"]


@dataclass(frozen=True)
class Cell:
    """One server under one load, all rounds.

    Attributes:
        rates: output tokens a second of all clients together, by round.
        firsts: seconds to the first token, by round and request.
        answers: tokens a second of one answer after its first token, by round: the median of its requests.
    """

    rates: dict[int, float]
    firsts: dict[int, list[float]]
    answers: dict[int, float]

    @property
    def all_firsts(self) -> list[float]:
        return [first for found in self.firsts.values() for first in found]

    @property
    def late(self) -> float:
        """The 95th percentile of seconds to the first token."""
        found = self.all_firsts
        return quantiles(found, n=20, method="inclusive")[-1] if len(found) > 1 else found[0]


def key_of(server: Server, load: Load, number: int) -> dict[str, Any]:
    """What makes a measurement of a server this one and no other."""
    return {"peer": server.title, "round": number, "load": load.key(), "facts": server.facts}


def bench_key(name: str, arguments: argparse.Namespace, number: int) -> dict[str, Any]:
    """The same of `qrun bench` on a folder of this name."""
    lengths = {"prompt": arguments.prompt, "tokens": arguments.tokens, "threads": arguments.threads}
    return {"peer": f"qrun bench {name}", "round": number, **lengths}


def cell_of(records: Records, keys: dict[int, dict[str, Any]]) -> Cell:
    """What the records of one server and load hold; ``keys`` by round."""
    rates, firsts, answers = {}, {}, {}
    for number, key in keys.items():
        record = records.read("serving", key)
        if record is None or "failed" in record:
            continue
        requests = record["requests"]
        rates[number] = sum(each["tokens"] for each in requests) / record["seconds"]
        firsts[number] = [each["first"] for each in requests]
        between = [
            (each["tokens"] - 1) / (each["whole"] - each["first"]) for each in requests if each["tokens"] > 1
        ]
        answers[number] = median(between)
    return Cell(rates, firsts, answers)


def ratios(ours: dict[int, float], theirs: dict[int, float]) -> list[float]:
    """Ours by theirs in each round that both have."""
    return [ours[number] / theirs[number] for number in sorted(ours.keys() & theirs.keys())]


Cells = dict[tuple[str, Load], Cell]


def targets(servers: Sequence[Server], loads: Sequence[Load], cells: Cells) -> list[list[str]]:
    """Rows of what was aimed at, and whether it is reached; the best peer is the one with the best median."""
    rows = []
    most = max(load.clients for load in loads)
    for server in (each for each in servers if each.ours):
        peers = [each for each in servers if not each.ours and each.bits == server.bits]
        for load in loads:
            ours = cells[server.title, load]
            measured = [peer for peer in peers if cells[peer.title, load].rates]
            if not ours.rates or not measured:
                continue
            best = max(measured, key=lambda peer: median(cells[peer.title, load].rates.values()))
            found = ratios(ours.rates, cells[best.title, load].rates)
            aim = 2.0 if load.shared else 1.3 if load.clients == most else 1.1 if load.clients == 1 else 1.0
            reached = "yes" if median(found) >= aim else "**no**"
            what = f"output tokens/s, {load.name}"
            rows.append(
                [server.title, what, best.title, f"{spread(found, 2)} times", f"{aim} times", reached]
            )
            if load.clients == most:
                least = min(measured, key=lambda peer: cells[peer.title, load].late)
                share = ours.late / cells[least.title, load].late
                what = f"95th percentile of the first token, {load.name}"
                reached = "yes" if share <= 1 else "**no**"
                rows.append([server.title, what, least.title, f"{share:.2f} times", "at most 1.0", reached])
    return rows


def own_cost(servers: Sequence[Server], loads: Sequence[Load], cells: Cells, benches: Any) -> list[list[str]]:
    """Decoding at one client by decoding of `qrun bench`, in each round."""
    rows = []
    alone = next((load for load in loads if load.clients == 1), None)
    for server in (each for each in servers if each.ours and alone is not None):
        bench = benches(server)
        found = ratios(cells[server.title, alone].answers, bench)  # type: ignore[index]
        if found:
            reached = "yes" if median(found) >= 0.95 else "**no**"
            rows.append(
                [server.title, spread(list(bench.values())), f"{spread(found, 3)} times", "0.95", reached]
            )
    return rows


def write_report(
    arguments: argparse.Namespace,
    servers: Sequence[Server],
    loads: Sequence[Load],
    records: Records,
    facts: dict[str, Any],
) -> None:
    """report.md, report.json and two charts in ``arguments.out``."""
    rounds = range(1, arguments.rounds + 1)
    cells = {
        (server.title, load): cell_of(records, {number: key_of(server, load, number) for number in rounds})
        for server in servers
        for load in loads
    }

    def benches(server: Server) -> dict[int, float]:
        found = {}
        for number in rounds:
            record = records.read("bench", bench_key(server.title.removeprefix("qrun "), arguments, number))
            if record is not None and "bench" in record:
                found[number] = record["bench"]["results"][0]["decode_tokens_per_second"]
        return found

    parts = [f"# Servers under load: Qwen2.5's {arguments.shape.upper()} shape, random weights"]
    parts.append(conditions_text(facts))
    several = f"{arguments.requests} requests, one after the other,"
    many = "one request" if arguments.requests == 1 else several
    parts.append(
        f"Prompts of {arguments.prompt} token ids, {arguments.tokens} new tokens, greedy, streamed; each "
        f"client sends {many} in a round. {arguments.rounds} "
        f"rounds, servers in turn, {arguments.threads} threads each. Medians of the rounds, their range in "
        "brackets; the 95th percentile is of all requests. OpenVINO's continuous batching stands behind a "
        "server that does not even make text of its tokens, which flatters it."
    )
    for load in loads:
        rows = [[server.title, *_shown(cells[server.title, load])] for server in servers]
        parts += [f"## {load.name}", table(_HEAD, rows)]
    parts += [
        "## Aims",
        table(["ours", "what", "best peer", "found", "aim", "reached"], targets(servers, loads, cells)),
    ]
    parts.append(
        table(
            ["ours", "`qrun bench`, tokens/s", "the server's by that", "aim", "reached"],
            own_cost(servers, loads, cells, benches),
        )
    )
    parts += [
        "## Settings",
        table(["server", "options"], [[each.title, f"`{each.facts['options']}`"] for each in servers]),
    ]
    plain = [load for load in loads if not load.shared]
    files = {
        "report.md": "\n\n".join([*parts, "![throughput](throughput.svg)", "![first token](first-token.svg)"])
        + "\n",
        "throughput.svg": lines(
            "Output tokens a second, all clients together", "tokens/s", _rates(servers, plain, cells)
        ),
        "first-token.svg": lines(
            "Time to the first token", "seconds, median of requests", _firsts(servers, plain, cells)
        ),
        "report.json": json.dumps(_as_json(servers, loads, cells, facts), indent=1) + "\n",
    }
    for name, text in files.items():
        (arguments.out / name).write_text(text, encoding="utf-8")
    print(files["report.md"])


def _shown(cell: Cell) -> list[str]:
    if not cell.rates:
        return ["not measured", "", "", ""]
    return [
        spread(list(cell.rates.values())),
        f"{1000 * median(cell.all_firsts):,.0f}",
        f"{1000 * cell.late:,.0f}",
        spread(list(cell.answers.values())),
    ]


def _rates(servers: Sequence[Server], loads: Sequence[Load], cells: Cells) -> list[Line]:
    return _lines(servers, loads, {place: list(cell.rates.values()) for place, cell in cells.items()})


def _firsts(servers: Sequence[Server], loads: Sequence[Load], cells: Cells) -> list[Line]:
    by_round = {place: [median(each) for each in cell.firsts.values()] for place, cell in cells.items()}
    return _lines(servers, loads, by_round)


def _lines(
    servers: Sequence[Server], loads: Sequence[Load], values: dict[tuple[str, Load], list[float]]
) -> list[Line]:
    found = []
    for server in servers:
        points = [
            (load.clients, median(each), min(each), max(each))
            for load in loads
            if (each := values[server.title, load])
        ]
        if points:
            found.append(Line(server.title, points, server.ours))
    return found


def _as_json(
    servers: Sequence[Server], loads: Sequence[Load], cells: Cells, facts: dict[str, Any]
) -> dict[str, Any]:
    results = [
        {
            "server": server.title,
            "load": load.key(),
            "output_tokens_per_second": list(cell.rates.values()),
            "first_token_seconds": cell.all_firsts,
            "answer_tokens_per_second": list(cell.answers.values()),
        }
        for server in servers
        for load in loads
        if (cell := cells[server.title, load]).rates
    ]
    return {"benchmark": "serving", "results": results, **facts}
