"""What a verification found: decided by the table of limits, written for people and for machines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qconvert.proof.compare import GreedyCheck, Measures, Rows
from qconvert.proof.limits import LIMITS, Limit, limit_value
from qconvert.proof.weight_check import WeightCheck

REPORT_JSON = "verification.json"
REPORT_MARKDOWN = "verification.md"
REPORT_VERSION = 1
# After so many failures of one kind the text only counts the rest.
_SHOWN_FAILURES = 8
# Measures of single positions, and the column of ``compare.Rows`` that holds them.
_LOCATED = {"max_difference": "max_difference", "max_kl": "kl"}


@dataclass(frozen=True)
class PathResult:
    """One case on one path; what was measured, by what it is compared with: "checkpoint", "own weights"."""

    case: str
    path: str
    tokens: int
    measures: Mapping[str, Measures]
    rows: Mapping[str, Rows]


@dataclass(frozen=True)
class Answer:
    """A prompt and what was generated after it, its end token included; token ids."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class GreedyResult:
    """Greedy answers of qrun, judged by the checkpoint and by the export's own weights.

    Steps are counted through all answers. ``error`` says why they ended early; None if they did not.
    """

    answers: tuple[Answer, ...]
    error: str | None
    checks: Mapping[str, GreedyCheck]


@dataclass(frozen=True)
class TwinResult:
    """A sharp twin against PyTorch, and the graph against its twin.

    Attributes:
        graph: the file.
        positions: at which logits were compared.
        max_difference: of any logit of the twin from PyTorch's with the stored weights.
        max_difference_at: the position.
        mean_rounding: KL divergence of the graph from its twin, mean over the positions, in nats; None where
            only the twin ran.
        max_rounding: the same of the worst position.
    """

    graph: str
    positions: int
    max_difference: float
    max_difference_at: int
    mean_rounding: float | None = None
    max_rounding: float | None = None


@dataclass(frozen=True)
class Failure:
    """Something beyond a limit: where ("long, token by token", or a tensor's name) and what."""

    where: str
    what: str


@dataclass(frozen=True)
class Report:
    """The outcome of one verification; see ``verify.verify``."""

    name: str
    precision: str
    device: str
    reference: str
    notes: tuple[str, ...]
    weights: WeightCheck
    paths: tuple[PathResult, ...]
    greedy: GreedyResult
    twins: tuple[TwinResult, ...]
    failed: tuple[Failure, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        return not self.failed

    def failures(self) -> str:
        """The failures, one a line, for an error message; empty if there are none."""
        lines = [f"{failure.where}: {failure.what}" for failure in self.failed[:_SHOWN_FAILURES]]
        if len(self.failed) > _SHOWN_FAILURES:
            lines.append(f"and {len(self.failed) - _SHOWN_FAILURES} more")
        return "\n".join(lines)

    def verdict(self) -> dict[str, Any]:
        """The manifest's ``verification``."""
        main = self.main_result
        measures = main.measures["checkpoint"]
        return _plain_object(
            {
                "status": "passed" if self.passed else "failed",
                "report": REPORT_JSON,
                "reference": self.reference,
                "case": f"{main.case}, {main.path}",
                "max_logit_difference": max(
                    path.measures["checkpoint"].max_difference for path in self.paths
                ),
                "mean_kl": measures.mean_kl,
                "top1_agreement": measures.top1,
                "perplexity": measures.export_perplexity,
                "reference_perplexity": measures.reference_perplexity,
                "greedy_steps": self.greedy.checks["checkpoint"].steps,
                "greedy_agreed": self.greedy.checks["checkpoint"].agreed,
            }
        )

    @property
    def main_result(self) -> PathResult:
        """The whole long case, or the longest there is: the one result to name if one is to be named."""
        return max(self.paths, key=lambda path: (path.measures["checkpoint"].positions, path.path == "whole"))

    def to_json(self) -> dict[str, Any]:
        """Everything, as ``verification.json`` holds it."""
        near_tie = limit_value("near_tie", self.precision)
        return _plain_object(
            {
                "format": "qconvert-verification",
                "format_version": REPORT_VERSION,
                "status": "passed" if self.passed else "failed",
                "name": self.name,
                "precision": self.precision,
                "device": self.device,
                "reference": self.reference,
                "seconds": round(self.seconds, 2),
                "notes": list(self.notes),
                "failures": [asdict(failure) for failure in self.failed],
                "limits": [
                    {"measure": limit.key, "against": limit.against, "value": limit.values[self.precision]}
                    for limit in LIMITS
                    if self.precision in limit.values
                ],
                "weights": asdict(self.weights),
                "cases": [
                    {
                        "case": path.case,
                        "path": path.path,
                        "tokens": path.tokens,
                        "compared_with": {name: asdict(found) for name, found in path.measures.items()},
                    }
                    for path in self.paths
                ],
                "twins": [asdict(twin) for twin in self.twins],
                "greedy": {
                    "answers": [asdict(answer) for answer in self.greedy.answers],
                    "error": self.greedy.error,
                    "judged_by": {
                        name: {**asdict(check), "outcome": check.outcome(near_tie)}
                        for name, check in self.greedy.checks.items()
                    },
                },
            }
        )


def path_failures(precision: str, paths: Sequence[PathResult]) -> list[Failure]:
    """Paths on which logits are beyond a limit."""
    failed = []
    whole_is_right: dict[str, bool] = {}
    for path in paths:
        what = _path_failure(precision, path)
        whole_is_right.setdefault(path.case, what is None)  # the first path of a case takes it whole
        if what is not None:
            hint = "; the same prompt at once is right: look at the KV cache and its lengths"
            failed.append(
                Failure(f"{path.case}, {path.path}", what + (hint if whole_is_right[path.case] else ""))
            )
    return failed


def greedy_failures(precision: str, greedy: GreedyResult) -> list[Failure]:
    """A greedy answer that broke off, or that is not PyTorch's."""
    failed = []
    near_tie = limit_value("near_tie", precision)
    judge = "own weights" if "own weights" in greedy.checks else "checkpoint"
    check = greedy.checks[judge]
    if greedy.error is not None:
        failed.append(Failure("greedy answer", f"after {check.steps} tokens: {greedy.error}"))
    if check.outcome(near_tie) == "different":
        assert check.worst is not None
        failed.append(
            Failure(
                "greedy answer",
                f"at step {check.worst.step} token {check.worst.taken} was taken, PyTorch takes "
                f"{check.worst.expected} by a margin of {check.worst.margin:.3g} (near tie: {near_tie:g}); "
                f"{check.agreed} of {check.steps} steps agree",
            )
        )
    return failed


def _path_failure(precision: str, path: PathResult) -> str | None:
    """Which limits a path breaks, those first that show where in the prompt it begins; None for no limit."""
    bad = path.rows["checkpoint"].non_finite_at
    if bad is not None:
        return f"NaN or Inf in the logits of position {bad}"
    broken = []
    for limit in LIMITS:
        measures = path.measures.get(limit.against)
        value = getattr(measures, limit.key, None)
        if measures is None or value is None or measures.positions < limit.positions:
            continue
        if limit.breaks(value, precision):
            broken.append((limit, value))
    broken.sort(key=lambda item: item[0].key not in _LOCATED)
    texts: list[str] = []
    for limit, value in broken:
        side = "at least" if limit.minimum else "at most"
        allowed = f"{side} {limit.values[precision]:g} against {limit.against}"
        text = f"{limit.title.split(',')[0]} {value:.3g} ({allowed})"
        texts.append(text + (_where_it_begins(limit, precision, path) if not texts else ""))
    return ", also ".join(texts) if texts else None


def _where_it_begins(limit: Limit, precision: str, path: PathResult) -> str:
    """From which position on a limit is broken, and what that says about the cause."""
    if limit.key not in _LOCATED:
        return ""
    rows = path.rows[limit.against]
    first = rows.first_above(_LOCATED[limit.key], limit.values[precision])
    if rows.position[0] != 0:
        return f" from position {first} on"
    if first == 0:
        return " from position 0 on (so not attention alone)"
    # The first token attends to itself only, at whatever angle.
    return f" from position {first} on, not before (look at attention, RoPE and windows)"


def _plain_object(value: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _plain(item) for key, item in value.items()}


def _plain(value: Any) -> Any:
    """JSON has no NaN and Inf: they become strings."""
    if isinstance(value, Mapping):
        return _plain_object(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
