"""The figures of a comparison, as tables of text that Markdown and HTML share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.compare.peers import Contender
from benchmarks.compare.records import Result
from benchmarks.compare.summary import (
    MEASURES,
    Behind,
    Quality,
    Row,
    advantage,
    behind_in_quality,
    behind_in_speed,
    best_advantage,
    best_peer,
    qualities,
    rows,
)
from benchmarks.compare.together import guesses_table, rows_table
from benchmarks.report import conditions

HEADLINE_PROMPT = 512
_JUDGED = ("prompt", "decode", "memory")
MISSING = "–"


class Measured(NamedTuple):
    """The records of a run: one answer alone, quality, several answers at once, several tokens a step."""

    alone: Sequence[Result]
    quality: Sequence[Result] = ()
    together: Sequence[Result] = ()
    guesses: Sequence[Result] = ()


class Report:
    """All figures of one comparison, and the words for them."""

    def __init__(
        self,
        facts: dict[str, Any],
        chosen: Sequence[Contender],
        *,
        conversions: dict[str, dict[str, Result]],
        records: Measured,
    ) -> None:
        self.facts = facts
        self.chosen = chosen
        self.records = records
        self.conversions = conversions
        prompts = facts["prompts"]
        self.headline = HEADLINE_PROMPT if HEADLINE_PROMPT in prompts else prompts[-1]
        fast = [contender for contender in chosen if not contender.quality_only]
        self.rows = {
            (shape, prompt): rows(fast, shape, prompt, conversions[shape], records.alone)
            for shape in facts["shapes"]
            for prompt in prompts
        }
        self.quality: list[Quality] = []
        if "sample" in conversions:
            self.quality = qualities(chosen, conversions["sample"], records.quality)
        self.settings = {}
        self.versions: dict[str, dict[str, str]] = {}
        every = [*records.alone, *records.together, *records.guesses]
        for record in every:
            if "result" in record:
                key = record["key"]
                self.settings[f"{key['peer']} {key['variant']}"] = record["result"]["settings"]
                self.versions[key["peer"]] = record["result"]["versions"]
        loads = [record["load_average"] for record in every]
        self.loads = (min(loads), max(loads)) if loads else None

    def headline_rows(self, shape: str) -> list[Row]:
        return self.rows[shape, self.headline]

    def behind(self) -> list[Behind]:
        found = []
        for (_, prompt), all_rows in self.rows.items():
            found += behind_in_speed(all_rows, [*_JUDGED, *(["load"] if prompt == self.headline else [])])
        return found + behind_in_quality(self.quality)

    def against_best(self, shape: str) -> list[list[str]]:
        """Each of our variants beside the best peer of any kind, at the headline prompt."""
        all_rows, found = self.headline_rows(shape), []
        for measure in ("prompt", "decode"):
            peer = best_peer(measure, all_rows)
            for ours in (row for row in all_rows if row.contender.ours and peer is not None):
                assert peer is not None
                factor = advantage(measure, ours, peer)
                if factor is not None:
                    figures = [number(ours.median(measure)), number(peer.median(measure))]
                    names = [MEASURES[measure].title, ours.contender.title, peer.contender.title]
                    found.append([*names, *figures, f"{factor:.2f}"])
        return found

    def together(self, shape: str) -> tuple[list[str], list[list[str]]] | None:
        """Header and lines of several answers at once; None where none were measured."""
        counts = self.facts.get("rows", [])
        header, lines = rows_table(self.chosen, self.records.together, shape, counts)
        return (header, lines) if lines else None

    def guesses(self) -> tuple[list[str], list[list[str]]] | None:
        """Header and lines of several tokens a step; None where none were measured."""
        header, lines = guesses_table(self.chosen, self.records.guesses)
        return (header, lines) if lines else None

    def to_json(self) -> dict[str, Any]:
        return {
            "benchmark": "compare",
            "settings": self.facts,
            **self.machine(),
            "peer_versions": self.versions,
            "peer_settings": self.settings,
            "load_average_during": self.loads,
            "rows": [
                {**row.to_json(), "advantage": self._advantages(row, all_rows)}
                for all_rows in self.rows.values()
                for row in all_rows
            ],
            "conversions": {
                shape: {name: _without_key(record) for name, record in records.items()}
                for shape, records in self.conversions.items()
            },
            "quality": [entry.to_json() for entry in self.quality],
            "together": [_without_kind(record) for record in self.records.together],
            "guesses": [_without_kind(record) for record in self.records.guesses],
            "behind": [entry.__dict__ for entry in self.behind()],
        }

    @staticmethod
    def _advantages(row: Row, all_rows: Sequence[Row]) -> dict[str, dict[str, float | None]]:
        """How many times better each of our variants is than this row, paired, for every measure."""
        ours = [other for other in all_rows if other.contender.ours and not row.contender.ours]
        return {o.contender.variant: {name: advantage(name, o, row) for name in MEASURES} for o in ours}

    def machine(self) -> dict[str, Any]:
        if not hasattr(self, "_machine"):
            self._machine = conditions({})
        return self._machine


def _without_key(record: Result) -> Result:
    return {name: value for name, value in record.items() if name not in ("key", "kind")}


def _without_kind(record: Result) -> Result:
    return {name: value for name, value in record.items() if name != "kind"}


def number(value: float | None, digits: int | None = None) -> str:
    """Three figures that mean something."""
    if value is None:
        return MISSING
    if digits is None:
        digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{digits}f}"


def gigabytes(value: float | None) -> str:
    return MISSING if value is None else f"{value / 1e9:.2f}"


def spread_text(row: Row, measure: str) -> str:
    """Median, and the least and greatest where there are several rounds."""
    values = row.rounds.get(measure)
    if not values:
        return MISSING
    middle = number(row.median(measure))
    if len(values) == 1:
        return middle
    return f"{middle} ({number(min(values.values()))}–{number(max(values.values()))})"


SPEED_HEADER = [
    *("engine", "prompt tokens/s", "decode tokens/s", "first token s", "load s", "load + 1 token s"),
    *("peak memory GB", "model GB", "we are × prompt", "we are × decode"),
]


def speed_table(all_rows: Sequence[Row]) -> list[list[str]]:
    """A line for every contender; ratios are to our variant of the same class that does best."""
    lines = []
    for row in all_rows:
        name = f"**{row.contender.title}**" if row.contender.ours else row.contender.title
        if not row.rounds:
            lines.append([name, f"failed: {row.failed}", *[""] * (len(SPEED_HEADER) - 2)])
            continue
        ratios = []
        for measure in ("prompt", "decode"):
            best = None if row.contender.ours else best_advantage(measure, row, all_rows)
            ratios.append("" if best is None else f"{best[1]:.2f} ({best[0].contender.variant})")
        figures = [spread_text(row, name) for name in ("prompt", "decode")]
        figures += [number(row.median(name)) for name in ("first_token", "load", "first_answer")]
        lines.append([name, *figures, gigabytes(row.median("memory")), gigabytes(row.model_bytes), *ratios])
        if row.failed:
            lines[-1][0] += f" (also {row.failed})"
    return lines


CONVERSION_HEADER = ["engine", "seconds", "peak memory GB", "model GB", "load average then"]


def conversion_table(chosen: Sequence[Contender], records: dict[str, Result]) -> list[list[str]]:
    lines = []
    for contender in (each for each in chosen if each.name in records):
        record = records[contender.name]
        if "failed" in record:
            lines.append(
                [contender.title, f"failed: {record['failed']}", "", "", str(record["load_average"])]
            )
        else:
            sizes = [gigabytes(record["peak_bytes"]), gigabytes(record["model_bytes"])]
            lines.append([contender.title, number(record["seconds"]), *sizes, str(record["load_average"])])
    return lines


def quality_table(entries: Sequence[Quality]) -> tuple[list[str], list[list[str]]]:
    texts = sorted({text for entry in entries for text in entry.by_text})
    header = ["engine", "MB", "mean KL", "top-1", *(f"KL {text}" for text in texts)]
    header += [f"perplexity {text}" for text in texts]
    lines = []
    for entry in entries:
        size = MISSING if entry.model_bytes is None else f"{entry.model_bytes / 1e6:.1f}"
        if not entry.by_text:
            reason = f"failed: {entry.failed}"
            lines.append([entry.contender.title, size, reason, *[""] * (len(header) - 3)])
            continue
        figures = [number(entry.mean("mean_kl"), 4), number(entry.mean("top1"), 3)]
        for measure, digits in (("mean_kl", 4), ("perplexity", 2)):
            found = [entry.by_text.get(text, {}).get(measure) for text in texts]
            figures += [number(value, digits) for value in found]
        lines.append([entry.contender.title, size, *figures])
    first = next((entry for entry in entries if entry.by_text), None)
    if first is not None:
        reference = [
            number(first.by_text[text]["reference_perplexity"], 2) for text in texts if text in first.by_text
        ]
        blank = ["", "0", "1", *[""] * len(texts)]
        lines.append(["PyTorch fp32 (reference)", *blank, *reference] if len(reference) == len(texts) else [])
    return header, [line for line in lines if line]


BEHIND_HEADER = ["measure", "ours", "peer", "we are ×"]


def behind_table(entries: Sequence[Behind]) -> list[list[str]]:
    ordered = sorted(entries, key=lambda entry: entry.factor)
    return [[entry.what, entry.ours, entry.peer, f"{entry.factor:.2f}"] for entry in ordered]


def conditions_lines(report: Report) -> list[str]:
    machine, facts = report.machine()["machine"], report.facts
    memory = f", {machine['memory_bytes'] / 2**30:.0f} GiB" if machine["memory_bytes"] else ""
    lines = [
        f"{report.machine()['date']}, {machine['cpu']}, {machine['cores']} cores"
        f" ({' '.join(machine['extensions'])}){memory}, {machine['system']}.",
        f"{facts['threads']} threads, {facts['generate']} new tokens after each prompt. Rounds in turn:"
        f" {facts['rounds']}, one process for each engine and round; median (least–greatest).",
    ]
    if report.loads is not None:
        least, most = report.loads
        busy = " The machine was not idle: do not trust the times." if most > 1.5 * machine["cores"] else ""
        lines.append(f"Load average when a measurement began: {least} to {most}.{busy}")
    return lines


BEST_HEADER = ["against the best peer", "ours", "best peer", "ours tokens/s", "peer tokens/s", "we are ×"]
EXPLANATION = (
    '"We are ×" is the median over rounds of how many times better our best variant of the same class is'
    " (4 bits against 4 bits, 8 bits against 8 bits and more), round against round; above 1 we are ahead."
    " Load is opening the model with its files in the page cache; peak memory is the process's, mapped files"
    " included, up to that prompt. Weights of these shapes are random: speed depends on shapes, not on"
    " values."
)


def version_table(report: Report) -> list[list[str]]:
    return [
        [peer, ", ".join(f"{name} {found}" for name, found in versions.items())]
        for peer, versions in report.versions.items()
    ]
