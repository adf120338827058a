"""Several answers at once, and several tokens a step: what is measured beside prompts and single answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from tokenizers import Tokenizer

from benchmarks.compare.peers import Contender
from benchmarks.compare.quality import FOLDER
from benchmarks.compare.records import Result
from benchmarks.compare.steps import QUALITY_SHAPE, Settings, Workshop
from benchmarks.report import spread

# Words of prose.txt, tokens to generate, temperature. Quoting: the text and its beginning once more, which
# the sample goes on copying. Continued greedily the sample soon repeats itself; drawn at 1.2 it does not.
TEXTS = {"quoting": (220, 160, 0.0), "continued": (120, 160, 0.0), "drawn": (120, 200, 1.2)}
_ONCE_MORE = 20

Pick = Callable[[Contender], bool]


def write_texts(workshop: Workshop) -> Path:
    """The texts of ``TEXTS`` as token ids of the sample model."""
    tokenizer = Tokenizer.from_file(str(workshop.model(QUALITY_SHAPE) / "tokenizer.json"))
    words = (FOLDER / "prose.txt").read_text(encoding="utf-8").split()
    texts = []
    for name, (length, generate, temperature) in TEXTS.items():
        text = " ".join(words[:length])
        if name == "quoting":
            text += "\n\n" + " ".join(words[:_ONCE_MORE])
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        texts.append({"name": name, "ids": ids, "generate": generate, "temperature": temperature})
    path = workshop.folder / "guessed-texts.json"
    path.write_text(json.dumps(texts))
    return path


def rounds_of(
    chosen: Sequence[Contender], rounds: int, measure: Callable[[Contender, int], Result]
) -> list[Result]:
    """Each contender once per round, each round beginning with another one."""
    found = []
    for number in range(1, rounds + 1):
        first = (number - 1) * len(chosen) // rounds
        found += [measure(contender, number) for contender in [*chosen[first:], *chosen[:first]]]
    return found


def measure_rows(
    workshop: Workshop, able: Sequence[Contender], shape: str, rounds: int, settings: Settings
) -> list[Result]:
    """Records of several answers at once, of the engines that can."""
    chosen = [contender for contender in able if contender.peer.together]
    return rounds_of(chosen, rounds, lambda each, number: workshop.rows(each, shape, number, settings))


def measure_guesses(
    workshop: Workshop, able: Sequence[Contender], rounds: int, settings: Settings
) -> list[Result]:
    """Records of several tokens a step, of the engines that can."""
    texts = write_texts(workshop)
    chosen = [contender for contender in able if contender.peer.guesses]
    return rounds_of(chosen, rounds, lambda each, number: workshop.guesses(each, texts, number, settings))


ROWS_NOTE = (
    "New tokens/s of all rows together, in the steps in which every row is past its first token; prompts of"
    " {prompt} tokens."
)


def rows_table(
    chosen: Sequence[Contender], records: Iterable[Result], shape: str, counts: Sequence[int]
) -> tuple[list[str], list[list[str]]]:
    """A line for every engine: tokens/s of 1, 2, ... rows, and how many times the last one is the first."""
    header = ["engine", *(f"{count} row{'s' * (count > 1)}" for count in counts), "last / first"]
    lines = []
    for contender in chosen:
        mine = [r for r in records_of(records, contender) if r["key"]["shape"] == shape]
        rates: dict[int, list[float]] = {count: [] for count in counts}
        for record in (each for each in mine if "result" in each):
            for one in record["result"]["rows"]:
                rates[one["rows"]].append(one["rows"] * one["steps"] / one["seconds"])
        if any(rates.values()):
            first, last = (median(rates[count]) for count in (counts[0], counts[-1]))
            cells = [spread(rates[count]) for count in counts]
            lines.append([_name(contender), *cells, f"{last / first:.2f}"])
        elif mine:
            failed = f"failed: {mine[0].get('failed')}"
            lines.append([_name(contender), failed, *[""] * (len(header) - 2)])
    return header, lines


GUESSES_NOTE = (
    "New tokens/s of the sample (135M) without and with guessed tokens, each pair in one process: a text of"
    " 220 words and its beginning once more; 120 words continued greedily; the same drawn at temperature 1.2,"
    " of the engines that draw the same tokens again. The ratio is the median of the rounds' own."
)


def guesses_table(
    chosen: Sequence[Contender], records: Iterable[Result]
) -> tuple[list[str], list[list[str]]]:
    """A line for every engine and text."""
    header = ["engine", "text", "without", "with", "ratio", "the same tokens"]
    lines = []
    for contender in chosen:
        results = [r["result"] for r in records_of(records, contender) if "result" in r]
        for name in TEXTS:
            found = [one for result in results for one in result["guesses"] if one["text"] == name]
            if not found:
                continue
            plain = [one["steps"] / one["seconds"]["plain"] for one in found]
            guessing = [one["steps"] / one["seconds"]["guessing"] for one in found]
            ratio = median(b / a for a, b in zip(plain, guessing))
            same = min(one["same_tokens"] for one in found)
            words = "all" if same > found[0]["steps"] else f"the first {same}"
            lines.append([_name(contender), name, spread(plain), spread(guessing), f"{ratio:.2f}", words])
    return header, lines


def records_of(records: Iterable[Result], contender: Contender) -> list[dict[str, Any]]:
    """Those of one contender."""
    who = (contender.peer.name, contender.variant)
    return [record for record in records if (record["key"]["peer"], record["key"]["variant"]) == who]


def _name(contender: Contender) -> str:
    return f"**{contender.title}**" if contender.ours else contender.title
