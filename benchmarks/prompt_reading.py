"""How a prompt is read fastest: by which graph, in which pieces, with how many threads.

1. Break-even: prompts of few tokens, by the decode graph alone and by the prefill graph before it. Where the
   second becomes the faster one is ``PREFILL_MIN_TOKENS`` of qconvert/targets.py.
2. Pieces: a long prompt in pieces of several sizes, and the memory that each takes. The best is
   ``PREFILL_CHUNK`` of runtime/qrun/decoding/generate.py.
3. Threads: prompt and decode with 1 thread up to all cores; the default is all that the process may use.

All settings of one part are run in turn, round after round; figures are medians. One session of each kind
stays open, so nothing here is about loading.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks.report import conditions, conditions_text, publish, summary, table
from qrun.backends.opening import open_session
from qrun.backends.session import Session
from qrun.decoding.generate import Context
from qrun.folder.manifest import read_manifest
from qrun.machine import usable_cores

LENGTHS = (4, 8, 16, 24, 32, 48, 64, 96, 128, 192)
PIECES = (32, 64, 128, 192, 256, 384, 512)
DECODED = 24


def read_prompt(session: Session, tokens: list[int], piece: int) -> float:
    """Seconds from an empty cache to the logits after the last token."""
    context = Context(session)
    context.cache.reserve(len(tokens))
    started = perf_counter()
    for start in range(0, len(tokens), piece):
        stop = min(start + piece, len(tokens))
        context.feed(tokens[start:stop], logits="last" if stop == len(tokens) else "none")
    return perf_counter() - started


def decode(session: Session, tokens: list[int]) -> float:
    """Seconds a token, decoded after a prompt."""
    context = Context(session)
    context.feed(tokens, logits="last")
    started = perf_counter()
    for token in tokens[:DECODED]:
        context.feed([token], logits="last")
    return (perf_counter() - started) / DECODED


def in_turn(runs: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Each run's seconds, round after round, after one round to warm up."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            seconds = run()
            if number > 0:
                found[name].append(seconds)
    return found


def break_even(folder: Path, threads: int, tokens: list[int], rounds: int) -> dict[str, Any]:
    """Seconds for short prompts by either way, and the first length from which the second graph wins."""
    session = open_session(
        folder, threads=threads
    )  # one for both ways: another one's threads would disturb it

    def read(length: int, least: int) -> float:
        session._prefill.min_tokens = least  # type: ignore[attr-defined]
        return read_prompt(session, tokens[:length], length)

    runs = {
        f"{name} {length}": lambda length=length, least=least: read(length, least)
        for length in LENGTHS
        for name, least in (("decode", 1 << 30), ("prefill", 1))
    }
    found = in_turn(runs, rounds)
    ratios = {
        length: median(
            slow / fast for slow, fast in zip(found[f"decode {length}"], found[f"prefill {length}"])
        )
        for length in LENGTHS
    }
    wins = [length for length in LENGTHS if all(ratios[more] > 1 for more in LENGTHS if more >= length)]
    return {
        "seconds": {name: summary(values) for name, values in found.items()},
        "speedup": ratios,
        "from_tokens": wins[0] if wins else None,
    }


def pieces(folder: Path, threads: int, tokens: list[int], rounds: int) -> dict[str, Any]:
    """Tokens a second of a long prompt by the size of its pieces."""
    session = open_session(folder, threads=threads)
    runs = {
        str(piece): lambda piece=piece: read_prompt(session, tokens, piece)
        for piece in PIECES
        if piece <= len(tokens)
    }
    found = in_turn(runs, rounds)
    return {name: summary([len(tokens) / seconds for seconds in values]) for name, values in found.items()}


def thread_counts(folder: Path, tokens: list[int], rounds: int) -> dict[str, Any]:
    """Prompt and decode speed by the number of threads."""
    sessions = {count: open_session(folder, threads=count) for count in range(1, usable_cores() + 1)}
    runs: dict[str, Callable[[], float]] = {}
    for count, session in sessions.items():
        runs[f"prompt {count}"] = lambda session=session: read_prompt(session, tokens, 256) / len(tokens)
        runs[f"decode {count}"] = lambda session=session: decode(session, tokens[:64])
    found = in_turn(runs, rounds)
    return {name: summary([1 / seconds for seconds in values]) for name, values in found.items()}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prompt_reading", description=__doc__)
    parser.add_argument("folder", type=Path, help="a model folder (part 1 needs one with a prefill graph)")
    parser.add_argument("--prompt", type=int, default=512, help="tokens (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of each part (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    manifest = read_manifest(arguments.folder)
    facts = conditions({"qrun": sys.executable})
    tokens = np.random.default_rng(1).integers(0, manifest.model.vocab_size, arguments.prompt).tolist()
    result: dict[str, Any] = {
        "benchmark": "prompt_reading",
        "model": manifest.name,
        "precision": manifest.precision,
        "recipe": manifest.raw.get("recipe"),
        "threads": arguments.threads,
        "prompt_tokens": arguments.prompt,
        "rounds": arguments.rounds,
        **facts,
    }
    parts = []
    if manifest.prefill is not None:
        even = result["break_even"] = break_even(
            arguments.folder, arguments.threads, tokens, arguments.rounds
        )
        rows = [
            [
                str(length),
                *(
                    f"{even['seconds'][f'{name} {length}']['median'] * 1e3:.1f}"
                    for name in ("decode", "prefill")
                ),
                f"{even['speedup'][length]:.2f}",
            ]
            for length in LENGTHS
        ]
        header = ["prompt tokens", "decode graph, ms", "prefill graph first, ms", "ratio"]
        parts.append(f"{table(header, rows)}\n\nThe prefill graph wins from {even['from_tokens']} tokens on.")
        gc.collect()
    speeds = result["pieces"] = pieces(arguments.folder, arguments.threads, tokens, arguments.rounds)
    parts.append(
        table(
            ["piece", "prompt tokens/s"], [[name, f"{found['median']:.0f}"] for name, found in speeds.items()]
        )
    )
    gc.collect()
    speeds = result["thread_counts"] = thread_counts(arguments.folder, tokens, arguments.rounds)
    parts.append(
        table(["threads", "tokens/s"], [[name, f"{found['median']:.1f}"] for name, found in speeds.items()])
    )
    what = (
        f"{manifest.name}, {manifest.precision}, {arguments.threads} threads, medians of {arguments.rounds}."
    )
    publish("\n\n".join([what, *parts, conditions_text(facts)]), result, arguments.json)


if __name__ == "__main__":
    main()
