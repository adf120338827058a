"""Scripted acceptance: an answer's tokens are given, and guessed from an earlier one much like it.

    python -m benchmarks.asked_again FOLDER --other 0.1

A request is asked once, and its answer is remembered as a server remembers it. Then it is asked again without
and with guesses in turn, where the sampler works as ever but takes the tokens of a script: those of the first
answer, but for a share of other ones. So it shows what guesses gain at a given acceptance, whatever the
weights are: random ones have no text that repeats itself.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.report import conditions, conditions_text, publish, spread, summary, table
from qrun.backends.opening import open_session
from qrun.backends.session import Session
from qrun.decoding.scheduler import Scheduler
from qrun.decoding.sequence import Sequence
from qrun.decoding.slots import Slots
from qrun.decoding.speculation import SUFFIX_TOKENS, Speculation
from qrun.sampling.params import SamplingParams
from qrun.sampling.sampler import Sampler


class Scripted(Sampler):
    """Samples as ever, and takes the next token of a script."""

    def __init__(self, params: SamplingParams, prompt: list[int], script: list[int]) -> None:
        super().__init__(params, prompt)
        self._script = iter(script)

    def sample(self, logits: NDArray[np.float32]) -> int:
        super().sample(logits)
        return next(self._script)


def ask(session: Session, prompt: list[int], script: list[int], speculation: Speculation | None) -> float:
    """Tokens per second behind the first one."""
    scheduler = Scheduler(Slots(session, 1), speculation=speculation)
    params = SamplingParams(max_tokens=len(script), ignore_eos=True)
    sequence = Sequence(prompt, params, session.manifest.model.context_length)
    sequence._sampler = Scripted(params, prompt, script)
    scheduler.add(sequence)
    while not sequence.token_ids:
        scheduler.step()
    started = perf_counter()
    while scheduler.busy:
        scheduler.step()
    assert sequence.token_ids == script
    return (len(script) - 1) / (perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.asked_again", description=__doc__)
    parser.add_argument("folder", type=Path, help="an exported folder")
    parser.add_argument("--prompt", type=int, default=256, help="tokens in the prompt (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="of the answer (default: %(default)s)")
    parser.add_argument("--other", type=float, default=0.0, help="share of other tokens (default: none)")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too; - for stdout")
    options = parser.parse_args()
    session = open_session(options.folder, threads=options.threads)
    vocab_size, random = session.manifest.model.vocab_size, np.random.default_rng(1)
    prompt, answer, others = (
        random.integers(0, vocab_size, count)
        for count in (options.prompt, options.tokens, options.rounds * options.tokens)
    )
    speculation = Speculation(vocab_size=vocab_size, past_tokens=SUFFIX_TOKENS)
    ways = {"without guesses": None, "with guesses": speculation}
    for way in ways.values():
        ask(session, prompt.tolist(), answer.tolist(), way)
    guessed, accepted = speculation.guessed, speculation.accepted
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for number, other in enumerate(others.reshape(options.rounds, -1)):
        script = np.where(random.random(options.tokens) < options.other, other, answer).tolist()
        for name in list(ways)[:: 1 if number % 2 else -1]:
            speeds[name].append(ask(session, prompt.tolist(), script, ways[name]))
    ratios = [fast / plain for plain, fast in zip(*speeds.values())]
    tried, true = speculation.guessed - guessed, speculation.accepted - accepted
    facts, manifest = conditions({"qrun": sys.executable}), session.manifest
    rows = [[name, spread(found)] for name, found in speeds.items()]
    rows.append(["with / without", spread(ratios, 3)])
    text = (
        f"{manifest.name}, {manifest.precision}, {options.threads} threads, prompt of {options.prompt}, "
        f"{options.tokens} tokens of which {options.other:.0%} are others than in the answer before, "
        f"{options.rounds} rounds in turn; {true} of {tried} guesses came true.\n\n"
        f"{table(['scripted answer', 'tokens/s'], rows)}\n\n{conditions_text(facts)}"
    )
    result: dict[str, Any] = {
        "benchmark": "asked_again",
        "model": manifest.name,
        "precision": manifest.precision,
        "prompt_tokens": options.prompt,
        "other_share": options.other,
        "tokens_per_second": {name: summary(found) for name, found in speeds.items()},
        "ratio": summary(ratios),
        "guessed": tried,
        "accepted": true,
        **facts,
    }
    publish(text, result, options.json)


if __name__ == "__main__":
    main()
