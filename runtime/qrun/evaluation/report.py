"""An evaluation as a whole: what was asked of which folders, what came of it, as one JSON object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qrun.evaluation.asking import Result
from qrun.evaluation.statistics import LEVEL, RESAMPLES, Interval, most_changed
from qrun.evaluation.summary import Change, Figure, Measure, changed
from qrun.evaluation.tasks import Task


@dataclass(frozen=True)
class Report:
    """What an evaluation has found.

    Attributes:
        facts: of the data and of how it was asked: "data", "lines", "seed", "max_tokens", ...
        folders: of each folder, that of --engine first: "label", "precision", "bytes", "device", "seconds".
        tasks: the lines.
        results: of each folder, in the order of ``tasks``.
        measures: all lines summed up.
    """

    facts: Mapping[str, Any]
    folders: Sequence[Mapping[str, Any]]
    tasks: Sequence[Task]
    results: Sequence[Sequence[Result]]
    measures: Sequence[Measure]

    @property
    def labels(self) -> list[str]:
        """What the folders are called."""
        return [str(each["label"]) for each in self.folders]

    @property
    def changed(self) -> list[int]:
        """See ``summary.changed``."""
        return changed(self.tasks, self.results)

    def to_json(self) -> dict[str, Any]:
        """All of it as one JSON object."""
        return {
            **self.facts,
            "interval": {"level": LEVEL, "resamples": RESAMPLES, "method": "paired percentile bootstrap"},
            "folders": list(self.folders),
            "measures": [_measure(each) for each in self.measures],
            "lines": [
                _line(task, [(label, each[place]) for label, each in zip(self.labels, self.results)])
                for place, task in enumerate(self.tasks)
            ],
        }


def _measure(measure: Measure) -> dict[str, Any]:
    return {
        "measure": measure.name,
        "group": measure.group,
        "lines": measure.lines,
        "folders": [_figure(measure, each) for each in measure.figures],
    }


def _figure(measure: Measure, figure: Figure) -> dict[str, Any]:
    found: dict[str, Any] = {"folder": figure.folder, **_interval(figure.value)}
    change = figure.change
    if change is not None:
        found["change"] = _interval(change.difference)
        if measure.counts_lines:
            found["change"] |= {"lost": change.lost, "won": change.won}
            if is_unchanged(change):
                found["change"]["most_changed"] = round(most_changed(measure.lines), 6)
    return found


def is_unchanged(change: Change) -> bool:
    """Whether no line has become right or wrong."""
    return change.lost == change.won == 0


def _interval(interval: Interval) -> dict[str, float]:
    return {
        "value": round(interval.value, 6),
        "low": round(interval.low, 6),
        "high": round(interval.high, 6),
    }


def _line(task: Task, found: Sequence[tuple[str, Result]]) -> dict[str, Any]:
    return {
        "line": task.number,
        "name": task.name,
        "kind": task.kind,
        "group": task.group,
        "expected": list(task.expected),
        "results": [{"folder": label, **_result(task, each)} for label, each in found],
    }


def _result(task: Task, result: Result) -> dict[str, Any]:
    if task.kind == "perplexity":
        return {"nats": round(result.nats, 6), "tokens": result.tokens}
    facts: dict[str, Any] = {"right": result.right, "answer": result.answer}
    if task.kind == "choice":
        assert result.probability is not None, "a choice has one"
        return {
            **facts,
            "probability": round(result.probability, 6),
            "logprobs": [round(each, 6) for each in result.logprobs],
        }
    return {**facts, "finish_reason": result.finish_reason, "tokens": result.tokens}
