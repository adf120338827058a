"""Do `qrun bench` and this comparison measure the same thing? Both over one model folder, in turn."""

from __future__ import annotations

import json
import subprocess
from statistics import median
from typing import Any

from benchmarks.compare.peers import OURS, PEERS, Contender
from benchmarks.compare.records import Result
from benchmarks.compare.steps import REPOSITORY, Settings, Workshop, our_environment
from benchmarks.report import spread, table

# Two processes that measure the same thing differ by this much on a quiet machine.
NOISE = 0.05
_FIGURES = {
    "prompt tokens/s": ("prefill_tokens_per_second", "prompt"),
    "decode tokens/s": ("decode_tokens_per_second", "decode"),
    "load s": ("load_seconds", "load"),
}


def check_bench(workshop: Workshop, shape: str, settings: Settings, rounds: int) -> int:
    """Print both and their ratio for each prompt length; exit code 0 where all agree within the noise."""
    from benchmarks.compare.summary import rows

    contender = Contender(PEERS[OURS], next(iter(PEERS[OURS].variants)))
    for step in (
        workshop.environment(contender.peer),
        workshop.checkpoint(shape),
        converted := workshop.conversion(contender, shape),
    ):
        if "failed" in step:
            print(f"failed: {step['failed']}")
            return 1
    bench: list[Result] = []
    compared: list[Result] = []
    for number in range(1, rounds + 1):
        bench.append(_qrun_bench(workshop, contender, shape, settings))
        measured = workshop.measure_now(contender, shape, settings)
        key = {"peer": OURS, "variant": contender.variant, "shape": shape, "round": number}
        compared.append({"key": key, "result": measured})
    lines, agree = [], True
    for prompt in settings.prompts:
        [row] = rows([contender], shape, prompt, {contender.name: converted}, compared)
        for title, (theirs, ours) in _FIGURES.items():
            found = [_figure(result, prompt, theirs) for result in bench]
            ratio = median(value / row.rounds[ours][n] for n, value in enumerate(found, 1))
            agree &= abs(ratio - 1) <= NOISE or ours == "load"
            lines.append(
                [f"{prompt}", title, spread(found), spread([*row.rounds[ours].values()]), f"{ratio:.3f}"]
            )
    print(table(["prompt", "figure", "qrun bench", "compare", "qrun bench / compare"], lines))
    print(f"\n{'They agree' if agree else 'They do not agree'} within {NOISE:.0%} (load is not judged).")
    return 0 if agree else 1


def _qrun_bench(workshop: Workshop, contender: Contender, shape: str, settings: Settings) -> dict[str, Any]:
    folder = str(workshop.converted(contender, shape))
    command = [
        str(workshop.python(contender.peer)),
        "-m",
        "qrun.cli",
        "bench",
        "--engine",
        folder,
        "--json",
    ]
    command += ["-p", ",".join(map(str, settings.prompts)), "-n", str(settings.generate), "-r", "1"]
    command += ["--threads", str(settings.threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, cwd=REPOSITORY, env=our_environment(), check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _figure(bench: dict[str, Any], prompt: int, name: str) -> float:
    [row] = [row for row in bench["results"] if row["prompt_tokens"] == prompt]
    return float(row[name])
