"""Decode speed of qrun's public loop beside a bare loop over ONNX Runtime with bound buffers.

Both run the same int4 folder of a Qwen2.5 shape (random weights) greedily, in one process and in turn, and
must choose the same tokens. The bare loop is the least that can be written: keys and values bound once and in
place, one binding for token and logits, a new attention mask at each step, numpy's argmax. The target is a
ratio of at least 0.97 on the 0.5B shape (below it, Python's own microseconds weigh more than the model).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from benchmarks.report import conditions, conditions_text, publish, spread, summary, table
from benchmarks.shapes import SHAPES
from qrun.generate import Context, Finished, Token, generate
from qrun.manifest import read_manifest
from qrun.sampling import SamplingParams
from qrun.session import open_session, usable_cores

REPOSITORY = Path(__file__).resolve().parent.parent
TARGET = 0.97


class Answer(NamedTuple):
    token_ids: list[int]
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """As in ``Finished``: N tokens chosen, N - 1 of them fed; the prompt's pass is not counted."""
        return (len(self.token_ids) - 1) / self.seconds


class QrunLoop:
    """The loop that users run, opened as they open it."""

    def __init__(self, folder: Path, threads: int) -> None:
        self._session = open_session(folder, threads=threads)

    def answer(self, prompt: list[int], tokens: int) -> Answer:
        params = SamplingParams(max_tokens=tokens, ignore_eos=True)
        token_ids: list[int] = []
        seconds = 0.0
        for event in generate(Context(self._session), prompt, params):
            if isinstance(event, Token):
                token_ids.append(event.token_id)
            elif isinstance(event, Finished):
                seconds = event.decode_seconds
        return Answer(token_ids, seconds)


class BareLoop:
    """ONNX Runtime and nothing else: no checks, no growth, buffers of exactly the length that is needed."""

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime

        self._ort = onnxruntime
        manifest = read_manifest(folder)
        self._facts, self._kv_dtype = manifest.model, np.dtype(manifest.kv.dtype)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            str(manifest.graph_path), options, providers=["CPUExecutionProvider"]
        )

    def answer(self, prompt: list[int], tokens: int) -> Answer:
        facts, value = self._facts, self._ort.OrtValue.ortvalue_from_numpy
        run, binding = self._session.run_with_iobinding, self._session.io_binding()
        capacity = len(prompt) + tokens
        shape = (1, facts.num_key_value_heads, capacity, facts.head_size)
        for layer in range(facts.num_hidden_layers):
            for part in ("key", "value"):
                buffer = value(np.zeros(shape, dtype=self._kv_dtype))
                binding.bind_ortvalue_input(f"past_key_values.{layer}.{part}", buffer)
                binding.bind_ortvalue_output(f"present.{layer}.{part}", buffer)
        ones = np.ones((1, capacity), dtype=np.int64)
        logits = np.empty((1, 1, facts.vocab_size), dtype=np.float32)
        binding.bind_ortvalue_output("logits", value(logits))
        binding.bind_ortvalue_input("logits_start", value(np.array([-1], dtype=np.int64)))
        binding.bind_ortvalue_input("input_ids", value(np.array([prompt], dtype=np.int64)))
        binding.bind_ortvalue_input("attention_mask", value(ones[:, : len(prompt)]))
        run(binding)

        started = perf_counter()
        token = np.empty((1, 1), dtype=np.int64)
        binding.bind_ortvalue_input("input_ids", value(token))
        token_ids = [int(logits.argmax())]
        for length in range(len(prompt) + 1, len(prompt) + tokens):
            token[0, 0] = token_ids[-1]
            binding.bind_ortvalue_input("attention_mask", value(ones[:, :length]))
            run(binding)
            token_ids.append(int(logits.argmax()))
        return Answer(token_ids, perf_counter() - started)


def prepare(shape: str, work: Path) -> Path:
    """The int4 folder of a shape: checkpoint and export are made where they are missing."""
    checkpoint, folder = work / f"random-{shape}", work / f"random-{shape}-onnx-int4"
    make = [sys.executable, "-m", "benchmarks.make_random", shape, str(checkpoint)]
    subprocess.run(make, check=True, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    if not folder.exists():
        export = [sys.executable, "-m", "qconvert.cli", "export", str(checkpoint), "--no-verify"]
        export += ["--precision", "int4", "--output", str(folder)]
        subprocess.run(export, check=True, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    return folder


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, list[Answer]]:
    """Answers of both loops, in the order ABBA ABBA ..., after one round to warm up."""
    loops: dict[str, QrunLoop | BareLoop] = {
        "qrun": QrunLoop(folder, arguments.threads),
        "bare loop": BareLoop(folder, arguments.threads),
    }
    vocab_size = read_manifest(folder).model.vocab_size
    prompt = np.random.default_rng(1).integers(0, vocab_size, arguments.prompt).tolist()
    answers: dict[str, list[Answer]] = {name: [] for name in loops}
    for repeat in range(arguments.repeats + 1):
        order = list(loops)[:: 1 if repeat % 2 else -1]
        for name in order:
            answer = loops[name].answer(prompt, arguments.tokens)
            if repeat > 0:
                answers[name].append(answer)
    first = answers["qrun"][0].token_ids
    for name, found in answers.items():
        if any(answer.token_ids != first for answer in found):
            raise SystemExit(
                f"{name} chose other tokens than qrun did at first: the loops do not do the same work"
            )
    return answers


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
    answers = measure(folder, arguments)

    speeds = {name: [answer.tokens_per_second for answer in found] for name, found in answers.items()}
    # Each round's two runs stand next to each other: their ratio is free of the machine's slow spells.
    ratios = [ours / bare for ours, bare in zip(speeds["qrun"], speeds["bare loop"])]
    manifest = read_manifest(folder)
    what = (
        f"{manifest.name}, {manifest.precision}, {arguments.threads} threads, prompt of {arguments.prompt}, "
        f"{arguments.tokens} tokens decoded greedily; median (range) of {arguments.repeats}, in turn."
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
