"""What all engines share, so that one definition of every figure holds for all of them.

Each ``*_engine.py`` beside this file is a program that runs in its peer's own environment (this module
needs the standard library and NumPy alone) with these verbs:

    convert SOURCE DESTINATION --variant V                          a checkpoint in the engine's own format
    measure MODEL --variant V --prompts 128,512 --generate 64 ...   one JSON line on stdout
    rows MODEL --variant V --rows 1,2,4 --prompts 256 ...           the same for several answers at once
    guesses MODEL --variant V --texts FILE                          the same without and with guessed tokens
    logits MODEL --variant V --tokens FILE --output FILE.npy        float32 [tokens, vocabulary]

A workload is a prompt of token ids, the same ones for all, and greedy generation that no end token ends.
Time to the first token runs from handing the prompt over until the first new token is chosen. Decoding is the
steps after it. Before each counted workload another prompt of the same length runs uncounted, with a few
new tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import platform
import random
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

WARM_UP_TOKENS = 4


class Timed(NamedTuple):
    """One workload: seconds to the first token, seconds of the steps after it, and the tokens chosen."""

    first_token_seconds: float
    decode_seconds: float
    tokens: list[int]


class Model:
    """A model that an engine has opened. Engines override ``prompt`` and ``step``, or ``run``."""

    settings: dict[str, Any]  # what was chosen, for the report

    def reset(self, capacity: int) -> None:
        """Forget all tokens and make room for ``capacity``; never counted in a time."""

    def prompt(self, ids: list[int]) -> int:
        """Read a prompt; returns the most likely next token."""
        raise NotImplementedError

    def step(self, token: int) -> int:
        """Read one token; returns the most likely next one."""
        raise NotImplementedError

    def run(self, ids: list[int], generate: int) -> Timed:
        """Read a prompt and generate exactly ``generate`` tokens."""
        started = perf_counter()
        tokens = [self.prompt(ids)]
        first = perf_counter()
        while len(tokens) < generate:
            tokens.append(self.step(tokens[-1]))
        return Timed(first - started, perf_counter() - first, tokens)

    def rows(self, prompts: list[list[int]], generate: int) -> float:
        """Read several prompts and generate ``generate`` tokens for each, all rows together.

        Returns:
            Seconds of the ``generate`` - 1 steps in which each row, past its first token, gets one.
        """
        raise NotImplementedError

    def guessing(self, temperature: float) -> Model:
        """The same model, which tries guessed tokens where the text repeats itself; see ``guesses``.

        Args:
            temperature: 0 is greedy. Engines that cannot draw the same tokens again refuse others.
        """
        raise NotImplementedError

    def plain(self, temperature: float) -> Model:
        """The same model, which tries none."""
        if temperature:
            raise NotImplementedError
        return self

    def logits(self, ids: list[int]) -> np.ndarray:
        """Float32 logits ``[len(ids), vocab]`` of every position of one text."""
        raise NotImplementedError


Open = Callable[[Path, str, int], Model]  # folder, variant, threads
Convert = Callable[[Path, Path, str], None]


def prompt_ids(length: int, vocabulary: int, seed: int = 0) -> list[int]:
    """Random token ids: the same for every engine, and speed does not depend on them."""
    source = random.Random(f"{length} {seed}")  # noqa: S311 (no secret)
    return [source.randrange(vocabulary) for _ in range(length)]


def peak_rss_bytes() -> int:
    """The largest resident set of this program so far, mapped files included."""
    try:
        # Unlike ru_maxrss it starts anew with the program, and not with what the parent held at the fork.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def measure(
    open_model: Callable[[], Model], prompts: list[int], generate: int, vocabulary: int
) -> dict[str, Any]:
    """Open a model and run its workloads, shortest first, so that each peak is of those up to it."""
    started = perf_counter()
    model = open_model()
    opened = perf_counter() - started
    model.reset(16)
    model.run(prompt_ids(1, vocabulary), 1)
    answered = perf_counter() - started
    result: dict[str, Any] = {
        "load_seconds": opened,
        "first_answer_seconds": answered,  # what an engine leaves for its first use counts here
        "load_peak_rss_bytes": peak_rss_bytes(),
        "settings": model.settings,
        "workloads": [],
    }
    for length in sorted(prompts):
        for seed, new in enumerate((min(WARM_UP_TOKENS, generate), generate)):
            model.reset(length + generate)
            # Other tokens than in the warm-up: some engines keep the caches of prompts that they have seen.
            timed = model.run(prompt_ids(length, vocabulary, seed), new)
            if len(timed.tokens) != new:
                raise SystemExit(f"{len(timed.tokens)} tokens were generated where {new} were asked for")
        result["workloads"].append(
            {
                "prompt_tokens": length,
                "generated_tokens": generate,
                "first_token_seconds": timed.first_token_seconds,
                "decode_seconds": timed.decode_seconds,
                "peak_rss_bytes": peak_rss_bytes(),
                "tokens": timed.tokens[:8],
            }
        )
    return result


def measure_rows(
    open_model: Callable[[], Model], rows: list[int], prompt: int, generate: int, vocabulary: int
) -> dict[str, Any]:
    """Open a model and decode so many answers at once, the fewest first."""
    model = open_model()
    found = []
    for count in sorted(rows):
        for seed, new in ((0, WARM_UP_TOKENS), (1, generate)):
            prompts = [prompt_ids(prompt, vocabulary, 1000 * seed + row) for row in range(count)]
            seconds = model.rows(prompts, new)
        found.append({"rows": count, "prompt_tokens": prompt, "steps": generate - 1, "seconds": seconds})
    return {"settings": model.settings, "rows": found}


def measure_guesses(open_model: Callable[[], Model], texts: list[dict[str, Any]]) -> dict[str, Any]:
    """Open a model and continue each text without and with guesses; an engine leaves out what it cannot.

    Args:
        open_model: opens it.
        texts: ``name``, ``ids``, ``generate`` and ``temperature`` of each.
    """
    model = open_model()
    found = []
    for text in texts:
        ids, new = text["ids"], text["generate"]
        try:
            each = {
                "plain": model.plain(text["temperature"]),
                "guessing": model.guessing(text["temperature"]),
            }
        except NotImplementedError:
            continue
        timed = {}
        for name, chosen in each.items():
            chosen.reset(len(ids) + new)
            chosen.run(ids[: len(ids) // 2], WARM_UP_TOKENS)
            chosen.reset(len(ids) + new)
            timed[name] = chosen.run(ids, new)
        first, second = timed["plain"].tokens, timed["guessing"].tokens
        same = next((at for at, (a, b) in enumerate(zip(first, second)) if a != b), new)
        seconds = {name: one.decode_seconds for name, one in timed.items()}
        found.append({"text": text["name"], "steps": new - 1, "same_tokens": same, "seconds": seconds})
    return {"settings": model.settings, "guesses": found}


def call(command: list[str]) -> None:
    """Run a converter; where it fails this program ends with its exit code, and its message is the last."""
    code = subprocess.run(command, check=False).returncode
    if code:
        sys.exit(code)


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Installed versions, Python's included."""
    found = {"python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@contextlib.contextmanager
def stdout_for_results() -> Iterator[Any]:
    """Stdout for the one JSON line; whatever libraries print, in C as well, goes to stderr."""
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w") as results:
        os.dup2(2, 1)
        yield results


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("convert", "measure", "rows", "guesses", "logits"):
        command = verbs.add_parser(verb)
        command.add_argument("model", type=Path)
        command.add_argument("--variant", required=True)
        command.add_argument("--threads", type=int, default=2)
        if verb == "convert":
            command.add_argument("destination", type=Path)
        elif verb == "guesses":
            command.add_argument("--texts", type=Path, required=True, help="JSON list of texts")
        elif verb in ("measure", "rows"):
            command.add_argument("--prompts", required=True)
            if verb == "rows":
                command.add_argument("--rows", required=True)
            command.add_argument("--generate", type=int, default=64)
            command.add_argument("--vocabulary", type=int, required=True)
        else:
            command.add_argument("--tokens", type=Path, required=True, help="JSON list of token ids")
            command.add_argument("--output", type=Path, required=True)
    return parser


def main(
    convert: Convert, open_model: Open, *, libraries: tuple[str, ...], packages: tuple[str, ...]
) -> None:
    """The command line of an engine's program.

    Args:
        convert: writes the engine's own format.
        open_model: opens it.
        libraries: modules ("name" or "module:name") that are imported before the clock of loading starts.
        packages: whose versions the result states.
    """
    chosen = _parser().parse_args()
    with stdout_for_results() as results:
        if chosen.verb == "convert":
            convert(chosen.model, chosen.destination, chosen.variant)
            return

        def opened() -> Model:
            return open_model(chosen.model, chosen.variant, chosen.threads)

        for library in libraries:
            module, _, name = library.partition(":")
            found = importlib.import_module(module)
            if name:
                getattr(found, name)  # transformers imports lazily

        if chosen.verb == "logits":
            ids = json.loads(chosen.tokens.read_text())
            np.save(chosen.output, opened().logits(ids).astype(np.float32, copy=False))
            return
        if chosen.verb == "guesses":
            result = measure_guesses(opened, json.loads(chosen.texts.read_text()))
        elif chosen.verb == "rows":
            rows = [int(count) for count in chosen.rows.split(",")]
            result = measure_rows(opened, rows, int(chosen.prompts), chosen.generate, chosen.vocabulary)
        else:
            prompts = [int(length) for length in chosen.prompts.split(",")]
            result = measure(opened, prompts, chosen.generate, chosen.vocabulary)
        result["versions"] = versions(packages)
        print(json.dumps(result), file=results, flush=True)
        # Some engines crash while the interpreter tears them down: what they measured stands.
        os._exit(0)
