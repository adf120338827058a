"""Our exports beside other engines: converts, measures in turn, and writes a report.

Everything that takes long is recorded as it is done: started again with the same options, the program goes on
where it was. Measure on an idle machine; --prepare does all that may be done on a busy one.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.compare.peers import Contender, contenders
from benchmarks.compare.quality import TEXTS, measure_quality, reference_logits
from benchmarks.compare.records import Result
from benchmarks.compare.steps import QUALITY_SHAPE, Settings, Workshop
from benchmarks.compare.together import measure_guesses, measure_rows
from benchmarks.shapes import SHAPES


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def prepare(workshop: Workshop, chosen: list[Contender], shapes: list[str]) -> dict[str, dict[str, Result]]:
    """Environments, models and conversions; returns conversions, or what failed before, by shape and name."""
    environments = {}
    for peer in {contender.peer.name: contender.peer for contender in chosen}.values():
        say(f"environment of {peer.title}")
        environments[peer.name] = workshop.environment(peer)
        tell_failure(environments[peer.name])
    conversions: dict[str, dict[str, Result]] = {}
    for shape in shapes:
        say(f"model {shape}")
        made = workshop.checkpoint(shape)
        tell_failure(made)
        conversions[shape] = {}
        for contender in taking_part(chosen, shape):
            before = next((r for r in (environments[contender.peer.name], made) if "failed" in r), None)
            if before is None:
                say(f"conversion {shape} {contender.title}")
                before = workshop.conversion(contender, shape)
                tell_failure(before)
            conversions[shape][contender.name] = before
    return conversions


def taking_part(chosen: list[Contender], shape: str) -> list[Contender]:
    return [contender for contender in chosen if shape == QUALITY_SHAPE or not contender.quality_only]


def tell_failure(record: Result) -> None:
    if "failed" in record:
        say(f"  failed: {record['failed']}")


def measure_rounds(
    workshop: Workshop,
    chosen: list[Contender],
    shape: str,
    *,
    conversions: dict[str, Result],
    rounds: int,
    settings: Settings,
) -> list[Result]:
    """Every contender once per round, in turn, so that a slow spell of the machine hits all of them.

    Each round begins with another one, since a process that runs after one of several gigabytes finds less of
    its files in the page cache.
    """
    measured = []
    able = [c for c in taking_part(chosen, shape) if "failed" not in conversions[c.name]]
    for number in range(1, rounds + 1):
        first = (number - 1) * len(able) // rounds
        for contender in able[first:] + able[:first]:
            started = time.monotonic()
            record = workshop.measurement(contender, shape, number, settings)
            seconds = time.monotonic() - started
            done = "recorded before" if seconds < 0.2 else f"{seconds:.0f} s"
            say(f"{shape} round {number} of {rounds}, {contender.title}: {done}")
            tell_failure(record)
            measured.append(record)
    return measured


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("--shapes", nargs="*", default=["0.5b", "1.5b"], choices=SHAPES, metavar="SHAPE")
    parser.add_argument("--peers", nargs="+", default=["all"], help="names, NAME:VARIANT, or all")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder of the report")
    parser.add_argument(
        "--work", type=Path, default=Path(".cache/compare"), help="environments, models, records"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", default="128,512,2048,8192", help="prompt lengths, tokens")
    parser.add_argument("--generate", type=int, default=64, help="new tokens after each prompt")
    parser.add_argument("--rows", default="1,2,4,8", help="answers at once; empty: none")
    parser.add_argument("--no-guesses", action="store_true", help="leave several tokens a step out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=int, default=1800, help="longest that one measurement may take")
    parser.add_argument("--memory-limit", type=float, metavar="GB", help="kill a conversion that takes more")
    parser.add_argument("--no-quality", action="store_true", help="leave the sample model out")
    parser.add_argument("--prepare", action="store_true", help="environments, models and conversions only")
    parser.add_argument("--retry-failed", action="store_true", help="work again on what failed before")
    parser.add_argument("--check-bench", action="store_true", help="does qrun bench agree with this program?")
    chosen = parser.parse_args(arguments)
    try:
        chosen.contenders = contenders(chosen.peers)
    except KeyError as error:
        parser.error(f"--peers: {error}")
    return chosen


def main() -> None:
    options = parse()
    limit = None if options.memory_limit is None else int(options.memory_limit * 1e9)
    workshop = Workshop(options.work.absolute(), retry_failed=options.retry_failed, memory_limit=limit)
    prompts = tuple(int(length) for length in options.prompts.split(","))
    counts = tuple(int(count) for count in options.rows.split(",") if count)
    settings = Settings(prompts, options.generate, options.threads, options.seconds, counts)
    chosen: list[Contender] = options.contenders
    if options.check_bench:
        from benchmarks.compare.check_bench import check_bench

        sys.exit(check_bench(workshop, options.shapes[0], settings, options.rounds))
    shapes = [*options.shapes, *([] if options.no_quality else [QUALITY_SHAPE])]
    conversions = prepare(workshop, chosen, shapes)
    if options.prepare:
        return
    quality: list[Result] = []
    if not options.no_quality:
        for text in TEXTS:
            say(f"reference logits, {text}")
            reference_logits(workshop, text)
        for contender in chosen:
            if "failed" not in conversions[QUALITY_SHAPE][contender.name]:
                say(f"quality of {contender.title}")
                quality += [measure_quality(workshop, contender, text) for text in TEXTS]
    measured: list[Result] = []
    together: list[Result] = []
    guessed: list[Result] = []
    for shape in options.shapes:
        measured += measure_rounds(
            workshop, chosen, shape, conversions=conversions[shape], rounds=options.rounds, settings=settings
        )
        if counts:
            able = [
                each for each in chosen if "failed" not in conversions[shape].get(each.name, {"failed": 1})
            ]
            together += measure_rows(workshop, able, shape, options.rounds, settings)
    if not options.no_quality and not options.no_guesses:
        converted = conversions[QUALITY_SHAPE]
        able = [each for each in chosen if "failed" not in converted[each.name]]
        guessed = measure_guesses(workshop, able, options.rounds, settings)

    from benchmarks.compare.figures import Measured
    from benchmarks.compare.report import write_report

    facts: dict[str, Any] = {"rounds": options.rounds, "shapes": options.shapes, **settings.key()}
    facts |= {"rows": list(counts), "rows_prompt": settings.rows_prompt}
    records = Measured(measured, quality, together, guessed)
    for path in write_report(options.out, facts, chosen, conversions=conversions, records=records):
        say(f"wrote {path}")


if __name__ == "__main__":
    main()
