"""From records to rows: medians with their spread, and ratios to us paired round by round. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import mean, median
from typing import Any

from benchmarks.compare.peers import Contender
from benchmarks.compare.records import Result

Rounds = dict[int, float]  # by number of the round


@dataclass(frozen=True)
class Measure:
    """A figure that a round gives. ``at`` finds it in a measurement's result and one of its workloads."""

    title: str
    unit: str
    better: str  # "higher" or "lower"
    at: Callable[[Result, Result], float | None]


def _decode_rate(result: Result, workload: Result) -> float | None:
    steps = workload["generated_tokens"] - 1
    return steps / workload["decode_seconds"] if steps else None


MEASURES = {
    "prompt": Measure(
        "prompt",
        "tokens/s",
        "higher",
        lambda result, work: work["prompt_tokens"] / work["first_token_seconds"],
    ),
    "decode": Measure("decode", "tokens/s", "higher", _decode_rate),
    "first_token": Measure("first token", "s", "lower", lambda result, work: work["first_token_seconds"]),
    "load": Measure("load", "s", "lower", lambda result, work: result["load_seconds"]),
    "first_answer": Measure(
        "load and one token", "s", "lower", lambda result, work: result["first_answer_seconds"]
    ),
    "memory": Measure("peak memory", "bytes", "lower", lambda result, work: work["peak_rss_bytes"]),
}


@dataclass
class Row:
    """One contender at one shape and prompt length; ``failed`` says why there are no figures."""

    contender: Contender
    shape: str
    prompt_tokens: int
    rounds: dict[str, Rounds] = field(default_factory=dict)
    model_bytes: int | None = None
    failed: str | None = None

    def median(self, measure: str) -> float | None:
        values = self.rounds.get(measure)
        return median(values.values()) if values else None

    def to_json(self) -> dict[str, Any]:
        measures = {
            name: {"median": median(values.values()), "least": min(values.values())}
            | {"greatest": max(values.values()), "rounds": values}
            for name, values in self.rounds.items()
            if values
        }
        who = {
            "peer": self.contender.peer.name,
            "variant": self.contender.variant,
            "bits": self.contender.bits,
        }
        rest = {key: getattr(self, key) for key in ("shape", "prompt_tokens", "model_bytes", "failed")}
        return {**who, **rest, "measures": measures}


def rows(
    chosen: Sequence[Contender],
    shape: str,
    prompt_tokens: int,
    conversions: dict[str, Result],
    measured: Iterable[Result],
) -> list[Row]:
    """One row for every contender, in their order, failed ones included."""
    found = []
    records = list(measured)
    for contender in chosen:
        row = Row(contender, shape, prompt_tokens)
        conversion = conversions[contender.name]
        row.model_bytes = conversion.get("model_bytes")
        row.failed = conversion.get("failed") and f"conversion: {conversion['failed']}"
        for record in records:
            key = record["key"]
            if (key["peer"], key["variant"], key["shape"]) != (contender.peer.name, contender.variant, shape):
                continue
            if "failed" in record:
                row.failed = row.failed or f"round {key['round']}: {record['failed']}"
                continue
            for workload in record["result"]["workloads"]:
                if workload["prompt_tokens"] == prompt_tokens:
                    for name, measure in MEASURES.items():
                        value = measure.at(record["result"], workload)
                        if value is not None:
                            row.rounds.setdefault(name, {})[key["round"]] = value
        if not row.rounds and row.failed is None:
            row.failed = "not measured"
        found.append(row)
    return found


def paired_ratio(ours: Rounds, peer: Rounds) -> float | None:
    """Median over the rounds that both have of ours / peer: what a slow spell did to both cancels out."""
    both = sorted(ours.keys() & peer.keys())
    return median(ours[number] / peer[number] for number in both) if both else None


def advantage(measure: str, ours: Row, peer: Row) -> float | None:
    """How many times better we are, paired: above 1 we are ahead, whatever the direction of the measure."""
    ratio = paired_ratio(ours.rounds.get(measure, {}), peer.rounds.get(measure, {}))
    if ratio is None or ratio == 0:
        return None
    return ratio if MEASURES[measure].better == "higher" else 1 / ratio


def best_advantage(measure: str, peer: Row, all_rows: Sequence[Row]) -> tuple[Row, float] | None:
    """Our variant of the peer's class of bits (8 where it has more) that does best against it."""
    wanted = min(peer.contender.bits, 8)
    found = []
    for row in all_rows:
        if row.contender.ours and row.contender.bits == wanted:
            factor = advantage(measure, row, peer)
            if factor is not None:
                found.append((row, factor))
    return max(found, key=lambda pair: pair[1], default=None)


@dataclass(frozen=True)
class Behind:
    """A comparison that we do not win. ``factor`` is how many times better we are, below 1."""

    what: str
    ours: str
    peer: str
    factor: float


def behind_in_speed(all_rows: Sequence[Row], measures: Sequence[str]) -> list[Behind]:
    """Each of our variants against every peer's variant that has at least as many bits.

    A variant with fewer bits than ours competes with our variant of those bits.
    """
    found = []
    peers = [row for row in all_rows if not row.contender.ours]
    for ours in (row for row in all_rows if row.contender.ours):
        for measure in measures:
            for peer in peers:
                factor = advantage(measure, ours, peer)
                if factor is not None and factor < 1 and peer.contender.bits >= ours.contender.bits:
                    what = f"{ours.shape}, prompt of {ours.prompt_tokens}: {MEASURES[measure].title}"
                    found.append(Behind(what, ours.contender.title, peer.contender.title, factor))
    return found


@dataclass(frozen=True)
class Quality:
    """One contender's quality on the sample model, averaged over the texts; ``model_bytes`` is its file."""

    contender: Contender
    model_bytes: int | None
    by_text: dict[str, dict[str, float]]
    failed: str | None = None

    def mean(self, measure: str) -> float | None:
        values = [figures[measure] for figures in self.by_text.values()]
        return mean(values) if values else None

    def to_json(self) -> dict[str, Any]:
        found = asdict(self)
        del found["contender"]
        who = {
            "peer": self.contender.peer.name,
            "variant": self.contender.variant,
            "bits": self.contender.bits,
        }
        return {**who, **found, "mean_kl": self.mean("mean_kl"), "top1": self.mean("top1")}


def qualities(
    chosen: Sequence[Contender], conversions: dict[str, Result], measured: Iterable[Result]
) -> list[Quality]:
    """One entry for every contender; failed ones say why."""
    records = list(measured)
    found = []
    for contender in chosen:
        mine = [
            r
            for r in records
            if (r["key"]["peer"], r["key"]["variant"]) == (contender.peer.name, contender.variant)
        ]
        conversion = conversions.get(contender.name, {})
        reasons = [conversion.get("failed"), *(record.get("failed") for record in mine)]
        by_text = {record["key"]["text"]: record["result"] for record in mine if "result" in record}
        failed = next((reason for reason in reasons if reason), None)
        found.append(Quality(contender, conversion.get("model_bytes"), by_text, failed))
    return found


def behind_in_quality(entries: Sequence[Quality]) -> list[Behind]:
    """Variants of ours to which a peer gives a smaller mean KL from a file that is no larger."""
    found = []
    for ours in (entry for entry in entries if entry.contender.ours):
        for peer in (entry for entry in entries if not entry.contender.ours):
            our_kl, peer_kl = ours.mean("mean_kl"), peer.mean("mean_kl")
            if our_kl is None or peer_kl is None or not ours.model_bytes or not peer.model_bytes:
                continue
            if peer_kl < our_kl and peer.model_bytes <= ours.model_bytes:
                what = "quality: mean KL at no more bytes"
                found.append(Behind(what, ours.contender.title, peer.contender.title, peer_kl / our_kl))
    return found


def best_peer(measure: str, all_rows: Sequence[Row]) -> Row | None:
    """The peer's row with the best median."""
    able = [(row.median(measure), row) for row in all_rows if not row.contender.ours]
    values = [(value, row) for value, row in able if value is not None]
    if not values:
        return None
    choose = max if MEASURES[measure].better == "higher" else min
    return choose(values, key=lambda pair: pair[0])[1]
