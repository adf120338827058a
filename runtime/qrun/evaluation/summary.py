"""All results of all folders, summed up: a measure for each kind of line, and what differs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

import numpy as np

from qrun.evaluation.asking import Result
from qrun.evaluation.statistics import Floats, Interval, bootstrap, wilson
from qrun.evaluation.tasks import KINDS, Task, groups_of

TITLES: dict[str, str] = {
    "exact": "exact: the answer is the expected text",
    "contains": "contains: the answer holds the expected text",
    "regex": "regex: the answer matches the expression",
    "choice": "choice: the likeliest choice is the right one",
    "probability": "probability: of the right choice among all",
    "perplexity": "perplexity: of texts, lower is better",
    "bits": "bits per byte: of texts, lower is better",
}


@dataclass(frozen=True)
class Change:
    """What one folder changes, beside the first one, on the same lines.

    Attributes:
        difference: this folder's value less the first one's; of perplexities their ratio less 1.
        lost, won: lines that only the first folder, or only this one, has right; 0 where nothing is right or
            wrong.
    """

    difference: Interval
    lost: int = 0
    won: int = 0


@dataclass(frozen=True)
class Figure:
    """A measure of one folder. ``change`` is None for the first one."""

    folder: str
    value: Interval
    change: Change | None = None


@dataclass(frozen=True)
class Measure:
    """One measure of all folders.

    Attributes:
        name: a kind, or "probability" of the right choice, or "bits" per byte.
        group: None for all lines of the kind.
        lines: how many.
        figures: one for each folder, in order.
    """

    name: str
    group: str | None
    lines: int
    figures: tuple[Figure, ...]

    @property
    def title(self) -> str:
        """For people."""
        return TITLES[self.name] + (f" ({self.group})" if self.group else "")

    @property
    def is_share(self) -> bool:
        """Whether values are shares, and differences points of percent."""
        return self.name not in ("perplexity", "bits")

    @property
    def counts_lines(self) -> bool:
        """Whether each line is right or wrong."""
        return self.name in ("exact", "contains", "regex", "choice")


def measures(
    tasks: Sequence[Task], folders: Sequence[str], found: Sequence[Sequence[Result]], seed: int
) -> list[Measure]:
    """Every measure that these lines have: of all lines of a kind, and of each group where there are several.

    Args:
        tasks: the lines.
        folders: their labels; the first is what the others are compared with.
        found: the results of each folder, in the order of ``tasks``.
        seed: of the intervals.
    """
    summed = []
    for kind in KINDS:
        mine = [place for place, task in enumerate(tasks) if task.kind == kind]
        groups = groups_of(tasks[place] for place in mine)
        for group in (None, *(groups if len(groups) > 1 else ())):
            places = [place for place in mine if group is None or tasks[place].group == group]
            if places:
                of_kind = [tasks[place] for place in places]
                results = [[each[place] for place in places] for each in found]
                summed += _of(of_kind, folders, results, group=group, seed=seed)
    return summed


def _of(
    tasks: Sequence[Task],
    folders: Sequence[str],
    found: Sequence[Sequence[Result]],
    *,
    group: str | None,
    seed: int,
) -> list[Measure]:
    kind = tasks[0].kind
    if kind == "perplexity":
        figures = _texts(tasks, folders, found, seed)
        # Per token only where all folders cut the texts into the same number of them.
        alike = all([a.tokens for a in each] == [b.tokens for b in found[0]] for each in found)
        return [Measure("perplexity" if alike else "bits", group, len(tasks), figures[alike])]
    measured = [Measure(kind, group, len(tasks), _right(folders, found, seed))]
    if kind == "choice":
        measured.append(Measure("probability", group, len(tasks), _probability(folders, found, seed)))
    return measured


def _right(folders: Sequence[str], found: Sequence[Sequence[Result]], seed: int) -> tuple[Figure, ...]:
    rights = [np.array([bool(result.right) for result in each]) for each in found]
    figures = []
    for index, (folder, right) in enumerate(zip(folders, rights)):
        change = None
        if index:
            lost, won = int((rights[0] & ~right).sum()), int((right & ~rights[0]).sum())
            change = Change(_mean(right.astype(float) - rights[0], seed), lost, won)
        figures.append(Figure(folder, wilson(int(right.sum()), len(right)), change))
    return tuple(figures)


def _probability(folders: Sequence[str], found: Sequence[Sequence[Result]], seed: int) -> tuple[Figure, ...]:
    shares = [np.array([result.probability or 0.0 for result in each]) for each in found]
    return tuple(
        Figure(folder, _mean(share, seed), Change(_mean(share - shares[0], seed)) if index else None)
        for index, (folder, share) in enumerate(zip(folders, shares))
    )


def _mean(values: Floats, seed: int) -> Interval:
    lines = len(values)
    return bootstrap(values[:, None], lambda sums: sums[..., 0] / lines, seed)


def _texts(
    tasks: Sequence[Task], folders: Sequence[str], found: Sequence[Sequence[Result]], seed: int
) -> dict[bool, tuple[Figure, ...]]:
    """Perplexity (True) and bits per byte (False), of all texts together, so that long ones weigh more."""
    nats = [np.array([result.nats for result in each]) for each in found]
    sizes = {
        True: [np.array([float(result.tokens) for result in each]) for each in found],
        False: [np.array([float(len(task.text.encode())) for task in tasks])] * len(found),
    }
    kinds = {}
    for per_token, size in sizes.items():
        figures = []
        for index, folder in enumerate(folders):
            columns = np.stack([nats[index], nats[0], size[index]], axis=-1)

            def value(sums: Floats, per_token: bool = per_token) -> Floats:
                mean = sums[..., 0] / sums[..., 2]
                return np.exp(mean) if per_token else mean / log(2)

            def ratio(sums: Floats, per_token: bool = per_token) -> Floats:
                mean, first = sums[..., 0] / sums[..., 2], sums[..., 1] / sums[..., 2]
                return np.expm1(mean - first) if per_token else mean / first - 1

            change = Change(bootstrap(columns, ratio, seed)) if index else None
            figures.append(Figure(folder, bootstrap(columns, value, seed), change))
        kinds[per_token] = tuple(figures)
    return kinds


def changed(tasks: Sequence[Task], found: Sequence[Sequence[Result]]) -> list[int]:
    """Places of the lines that some folder has right and another one wrong."""
    return [
        place
        for place, task in enumerate(tasks)
        if task.kind != "perplexity" and len({each[place].right for each in found}) > 1
    ]
