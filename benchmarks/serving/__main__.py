"""Throughput and waiting times of servers against numbers of clients, in turn, with a report.

    python -m benchmarks.serving --out report --qrun FOLDER \\
        --llama-server PROGRAM --gguf FILE --openvino FOLDER --openvino-python PROGRAM

Each round starts every server once, one after the other, and asks it with each load. What has been measured
is kept in OUT/records, so an interrupted run goes on where it was; ``--minutes`` ends it by itself.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any

from benchmarks.compare.records import Records, StepFailedError
from benchmarks.report import conditions
from benchmarks.serving.load import Load, measure
from benchmarks.serving.report import bench_key, key_of, write_report
from benchmarks.serving.servers import Server, llama_server, openvino, qrun, running

_CONTEXT = 2048  # tokens that a slot of llama-server has room for


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="records and report")
    parser.add_argument(
        "--qrun", type=Path, action="append", default=[], help="a model folder; may be repeated"
    )
    parser.add_argument("--qrun-options", default="", help="more options for `qrun serve`, as one text")
    parser.add_argument("--llama-server", type=Path, help="the program")
    parser.add_argument("--gguf", type=Path, action="append", default=[], help="for it; may be repeated")
    parser.add_argument("--openvino", type=Path, help="a folder that optimum-intel has written")
    parser.add_argument("--openvino-python", type=Path, default=sys.executable, help="has openvino-genai")
    parser.add_argument("--shape", default="0.5b", help="for the report's title (default: %(default)s)")
    parser.add_argument("--clients", default="1,2,4,8", help="how many at once (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer (default: %(default)s)")
    parser.add_argument(
        "--shared", type=int, default=1024, help="tokens that all prompts of the last load begin with"
    )
    parser.add_argument(
        "--requests", type=int, default=2, help="of a client in a round (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin nothing after so long")
    parser.add_argument("--retry-failed", action="store_true", help="try again what has failed before")
    return parser.parse_args()


def loads_of(arguments: argparse.Namespace) -> list[Load]:
    counts = [int(each) for each in arguments.clients.split(",")]
    common = {"prompt": arguments.prompt, "tokens": arguments.tokens, "requests": arguments.requests}
    shared = [Load(max(counts), shared=arguments.shared, **common)] if arguments.shared else []
    return [*(Load(count, **common) for count in counts), *shared]


def servers_of(arguments: argparse.Namespace, slots: int) -> list[Server]:
    threads = arguments.threads
    found = [qrun(each, slots, threads, tuple(arguments.qrun_options.split())) for each in arguments.qrun]
    found += [llama_server(arguments.llama_server, each, slots, threads, _CONTEXT) for each in arguments.gguf]
    if arguments.openvino:
        found.append(openvino(arguments.openvino_python, arguments.openvino, slots, threads))
    return found


def one_round(records: Records, server: Server, loads: list[Load], number: int, until: float) -> None:
    """Ask one server with each load that has no record yet."""
    left = [load for load in loads if records.read("serving", key_of(server, load, number)) is None]
    if not left or monotonic() > until:
        return
    print(f"round {number}: {server.title}", flush=True)
    with running(server) as url:
        measure(url, "model", Load(1, prompt=loads[0].prompt, tokens=8, requests=1), 999)  # to warm up
        for load in left:
            if monotonic() > until:
                return

            def work(load: Load = load) -> dict[str, Any]:
                try:
                    return measure(url, "model", load, number)
                except (RuntimeError, OSError) as error:
                    raise StepFailedError(str(error)) from error

            records.once("serving", key_of(server, load, number), work)


def bench(records: Records, arguments: argparse.Namespace, number: int) -> Iterator[dict[str, Any]]:
    """What `qrun bench` gives, for the server's own cost."""
    for folder in arguments.qrun:

        def work(folder: Path = folder) -> dict[str, Any]:
            command = [
                sys.executable,
                "-m",
                "qrun.cli",
                "bench",
                "--engine",
                str(folder),
                "--json",
                "-r",
                "3",
            ]
            command += [
                "-p",
                str(arguments.prompt),
                "-n",
                str(arguments.tokens),
                "--threads",
                str(arguments.threads),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise StepFailedError(done.stderr[-500:])
            return {"bench": json.loads(done.stdout)}

        yield records.once("bench", bench_key(folder.name, arguments, number), work)


def main() -> None:
    arguments = parse()
    until = monotonic() + 60 * arguments.minutes
    loads = loads_of(arguments)
    servers = servers_of(arguments, max(load.clients for load in loads))
    if not servers:
        raise SystemExit("give at least one of --qrun, --gguf with --llama-server, --openvino")
    records = Records(arguments.out / "records", retry_failed=arguments.retry_failed)
    for number in range(1, arguments.rounds + 1):
        # Another order in each round, so that nobody always has the machine as the one before leaves it.
        turn = number % len(servers)
        for server in [*servers[turn:], *servers[:turn]]:
            one_round(records, server, loads, number, until)
        if monotonic() < until:
            list(bench(records, arguments, number))
    pythons = {"client and qrun": sys.executable}
    if arguments.openvino:
        pythons["OpenVINO"] = str(arguments.openvino_python)
    write_report(arguments, servers, loads, records, conditions(pythons))


if __name__ == "__main__":
    main()
