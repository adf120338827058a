"""Decode speed of qrun's public loop beside a bare loop over ONNX Runtime with bound buffers.

Both run greedily on one int4 folder of a Qwen2.5 shape (random weights), over one ONNX Runtime session and
token by token in turn: A B A B for every single step, so that a slow spell of the machine hits both. They
must choose the same tokens. The bare loop is the least that can be written: keys and values bound once and in
place, one binding for token and logits, a new attention mask at each step, numpy's argmax. The target is a
ratio of at least 0.97 on the 0.5B shape (below it, Python's own microseconds weigh more than the model).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from benchmarks.report import conditions, conditions_text, publish, spread, summary, table
from benchmarks.shapes import SHAPES
from qrun.backends.opening import open_session
from qrun.backends.ort.session import OrtSession
from qrun.decoding.generate import Context, Token, generate
from qrun.folder.manifest import read_manifest
from qrun.machine import usable_cores
from qrun.sampling.sampler import SamplingParams

REPOSITORY = Path(__file__).resolve().parent.parent
TARGET = 0.97


class Step(NamedTuple):
    """One decoded token and the seconds from the token before it."""

    token_id: int
    seconds: float


def qrun_loop(session: OrtSession, prompt: list[int], tokens: int) -> Iterator[int]:
    """The loop that users run."""
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    for event in generate(Context(session), prompt, params):
        if isinstance(event, Token):
            yield event.token_id


def bare_loop(session: OrtSession, prompt: list[int], tokens: int) -> Iterator[int]:
    """ONNX Runtime and nothing else: no checks, no growth, buffers of exactly the length that is needed."""
    import onnxruntime

    facts, value = session.manifest.model, onnxruntime.OrtValue.ortvalue_from_numpy
    inference = session._inference
    run, binding = inference.run_with_iobinding, inference.io_binding()
    capacity = len(prompt) + tokens
    shape = (1, facts.num_key_value_heads, capacity, facts.head_size)
    for name in session.values.kv_names:
        buffer = value(np.zeros(shape, dtype=session.values.kv_dtype))
        binding.bind_ortvalue_input(f"past_key_values.{name}", buffer)
        binding.bind_ortvalue_output(f"present.{name}", buffer)
    ones = np.ones((1, capacity), dtype=np.int64)
    logits = np.empty((1, 1, facts.vocab_size), dtype=np.float32)
    binding.bind_ortvalue_output("logits", value(logits))
    binding.bind_ortvalue_input("logits_start", value(np.array([-1], dtype=np.int64)))
    binding.bind_ortvalue_input("input_ids", value(np.array([prompt], dtype=np.int64)))
    binding.bind_ortvalue_input("attention_mask", value(ones[:, : len(prompt)]))
    run(binding)

    token = np.empty((1, 1), dtype=np.int64)
    binding.bind_ortvalue_input("input_ids", value(token))
    token_id = int(logits.argmax())
    yield token_id
    for length in range(len(prompt) + 1, len(prompt) + tokens):
        token[0, 0] = token_id
        binding.bind_ortvalue_input("attention_mask", value(ones[:, :length]))
        run(binding)
        token_id = int(logits.argmax())
        yield token_id


LOOPS = {"qrun": qrun_loop, "bare loop": bare_loop}


def prepare(shape: str, work: Path) -> Path:
    """The int4 folder of a shape: checkpoint and export are made where they are missing."""
    checkpoint, folder = work / f"random-{shape}", work / f"random-{shape}-onnx-int4"
    make = [sys.executable, "-m", "benchmarks.make_random", shape, str(checkpoint)]
    subprocess.run(make, check=True, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    if not folder.exists():
        export = [sys.executable, "-m", "qconvert.cli", "export", str(checkpoint), "--no-verify"]
        export += ["--precision", "int4", "--recipe", "rtn", "--output", str(folder)]
        subprocess.run(export, check=True, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    return folder


def decode_in_turn(session: OrtSession, prompt: list[int], tokens: int) -> dict[str, list[Step]]:
    """Both loops over one prompt, a step of one after a step of the other; the prompt's pass left out."""
    running = {name: loop(session, prompt, tokens) for name, loop in LOOPS.items()}
    steps: dict[str, list[Step]] = {name: [] for name in LOOPS}
    for number in range(tokens):
        for name in list(LOOPS)[:: 1 if number % 2 else -1]:
            started = perf_counter()
            token_id = next(running[name])
            steps[name].append(Step(token_id, perf_counter() - started))
    chosen = {name: [step.token_id for step in found] for name, found in steps.items()}
    if chosen["qrun"] != chosen["bare loop"]:
        raise SystemExit("the loops chose different tokens: they do not do the same work")
    return {name: found[1:] for name, found in steps.items()}


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Tokens per second of each round (from its median step), after one round to warm up."""
    session = open_session(folder, threads=arguments.threads)
    assert isinstance(session, OrtSession)
    vocab_size = session.manifest.model.vocab_size
    prompt = np.random.default_rng(1).integers(0, vocab_size, arguments.prompt).tolist()
    speeds: dict[str, list[float]] = {name: [] for name in LOOPS}
    for repeat in range(arguments.repeats + 1):
        steps = decode_in_turn(session, prompt, arguments.tokens)
        if repeat > 0:
            for name, found in steps.items():
                speeds[name].append(1 / median(step.seconds for step in found))
    return speeds


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode_overhead", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="0.5b", help="default: %(default)s")
    parser.add_argument("--folder", type=Path, help="an exported folder, instead of a shape")
    parser.add_argument("--prompt", type=int, default=32, help="tokens in the prompt (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="tokens to decode (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=11, help="of each loop (default: %(default)s)")
    parser.add_argument(
        "--threads", type=int, default=usable_cores(), help="default: all cores (%(default)s)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny shape, three repeats: does it work at all?"
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(".cache/benchmarks"),
        help="models are kept here (default: %(default)s)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the result there too; - for stdout alone"
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.shape, arguments.repeats = "tiny", 3
    return arguments


def main() -> None:
    arguments = parse()
    work = arguments.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    folder = arguments.folder or prepare(arguments.shape, work)
    facts = conditions({"both": sys.executable})
    speeds = measure(folder, arguments)
    ratios = [ours / bare for ours, bare in zip(speeds["qrun"], speeds["bare loop"])]
    manifest = read_manifest(folder)
    what = (
        f"{manifest.name}, {manifest.precision}, {arguments.threads} threads, prompt of {arguments.prompt}, "
        f"{arguments.tokens} tokens decoded greedily, step by step in turn; "
        f"median step of a round, median (range) of {arguments.repeats} rounds."
    )
    rows = [[name, spread(found)] for name, found in speeds.items()]
    rows.append(["qrun / bare loop", spread(ratios, 3)])
    text = (
        f"{what}\n\n{table(['loop', 'tokens/s'], rows)}\n\n{conditions_text(facts)}\n\n"
        f"Target: at least {TARGET}: {'met' if median(ratios) >= TARGET else 'NOT met'}."
    )
    result: dict[str, Any] = {
        "benchmark": "decode_overhead",
        "model": manifest.name,
        "precision": manifest.precision,
        "threads": arguments.threads,
        "prompt_tokens": arguments.prompt,
        "decoded_tokens": arguments.tokens,
        "tokens_per_second": {name: summary(found) for name, found in speeds.items()},
        "ratio": summary(ratios),
        "target": TARGET,
        "met": median(ratios) >= TARGET,
        **facts,
    }
    publish(text, result, arguments.json)


if __name__ == "__main__":
    main()
