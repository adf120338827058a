"""Pure functions that compare two sets of logits, row by row, and a summary of the rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Column = NDArray[np.float64]


@dataclass(frozen=True)
class Rows:
    """What was measured at each position; all arrays are float64 ``[positions]``, in the order of positions.

    Attributes:
        position: index in the prompt.
        max_difference: largest absolute difference between any two logits of a token.
        mean_difference: mean of those differences over the vocabulary.
        kl: KL divergence of the exported distribution from the reference's, in nats.
        agrees: 1 where both put the same token first.
        reference_nll: negative log likelihood of the text's next token, in nats; NaN where there is none.
        export_nll: the same of the export.
    """

    position: Column
    max_difference: Column
    mean_difference: Column
    kl: Column
    agrees: Column
    reference_nll: Column
    export_nll: Column

    @property
    def non_finite_at(self) -> int | None:
        """The first position at which the export has NaN or Inf."""
        return self.first_above("max_difference", math.inf)

    def first_above(self, measure: str, limit: float) -> int | None:
        """The first position at which a measure is above ``limit``, or not finite."""
        values: Column = getattr(self, measure)
        bad = np.flatnonzero(~(values <= limit) | ~np.isfinite(values))
        return int(self.position[bad[0]]) if len(bad) else None


@dataclass(frozen=True)
class Measures:
    """The rows of one path in a few numbers; see ``Rows``. Perplexities are of the text's own tokens."""

    positions: int
    max_difference: float
    max_difference_at: int
    mean_difference: float
    mean_kl: float
    max_kl: float
    max_kl_at: int
    top1: float
    reference_perplexity: float | None
    export_perplexity: float | None

    @property
    def perplexity_ratio(self) -> float | None:
        """Perplexity of the export over the reference's."""
        if self.export_perplexity is None or self.reference_perplexity is None:
            return None
        return self.export_perplexity / self.reference_perplexity


def compare_rows(
    start: int,
    reference: torch.Tensor,
    export: torch.Tensor,
    next_tokens: torch.Tensor,
    reference_log: torch.Tensor | None = None,
) -> Rows:
    """Compare logits of consecutive positions.

    Args:
        start: position of the first row.
        reference: float32 ``[rows, vocab]``.
        export: float32 ``[rows, vocab]``.
        next_tokens: int64, the tokens that follow in the text; shorter than ``rows`` at its end.
        reference_log: ``log_softmax(reference)``, where it is at hand.
    """
    import torch

    true = torch.log_softmax(reference, -1) if reference_log is None else reference_log
    ours = torch.log_softmax(export, -1)
    difference = (export - reference).abs()
    known = next_tokens[:, None]

    def likelihoods(log: torch.Tensor) -> Column:
        found = -log[: len(known)].gather(1, known)[:, 0]
        return np.pad(found.double().numpy(), (0, len(log) - len(known)), constant_values=np.nan)

    return Rows(
        np.arange(start, start + len(reference), dtype=np.float64),
        difference.amax(-1).double().numpy(),
        difference.mean(-1).double().numpy(),
        # Rounding may leave a sum of -1e-8 where both are the same.
        (true.exp() * (true - ours)).sum(-1).clamp(min=0).double().numpy(),
        (reference.argmax(-1) == export.argmax(-1)).double().numpy(),
        likelihoods(true),
        likelihoods(ours),
    )


def join(pieces: list[Rows]) -> Rows:
    """Rows of consecutive pieces as one."""
    return Rows(
        *(np.concatenate([getattr(piece, name) for piece in pieces]) for name in Rows.__annotations__)
    )


def measure(rows: Rows, *, text: bool) -> Measures:
    """Summarise rows; without ``text`` (random tokens) perplexities mean nothing and are None."""
    known = ~np.isnan(rows.reference_nll)
    worst, worst_kl = int(rows.max_difference.argmax()), int(rows.kl.argmax())
    has_text = text and bool(known.any())
    return Measures(
        len(rows.position),
        float(rows.max_difference[worst]),
        int(rows.position[worst]),
        float(rows.mean_difference.mean()),
        float(rows.kl.mean()),
        float(rows.kl[worst_kl]),
        int(rows.position[worst_kl]),
        float(rows.agrees.mean()),
        float(np.exp(rows.reference_nll[known].mean())) if has_text else None,
        float(np.exp(rows.export_nll[known].mean())) if has_text else None,
    )


@dataclass(frozen=True)
class Divergence:
    """A step at which greedy decoding and PyTorch differ.

    ``margin`` is by how much PyTorch's logit of its own choice exceeds that of the token taken.
    """

    step: int
    expected: int
    taken: int
    margin: float


@dataclass(frozen=True)
class GreedyCheck:
    """A greedy answer against PyTorch, judged along the answer's own tokens.

    Attributes:
        steps: tokens generated.
        agreed: steps at which PyTorch, after the same tokens, would have taken the same one.
        first: the first step at which it would not; None means the answers are identical.
        worst: the step with the largest margin.
    """

    steps: int
    agreed: int
    first: Divergence | None
    worst: Divergence | None

    def outcome(self, near_tie: float) -> str:
        """ "identical", "near tie" (no margin above ``near_tie``) or "different"."""
        if self.first is None:
            return "identical"
        assert self.worst is not None
        return "near tie" if self.worst.margin <= near_tie else "different"


def check_greedy(tokens: list[int], logits: torch.Tensor) -> GreedyCheck:
    """Judge greedily generated tokens by teacher forcing.

    PyTorch reads prompt and answer in one pass; its logits at step i follow the very tokens that
    the export had fed. By induction the two greedy answers are identical exactly if PyTorch's most
    likely token is the answer's at every step.

    Args:
        tokens: the answer.
        logits: float32 ``[len(tokens), vocab]``, PyTorch's, from which each of them should come.
    """
    import torch

    best = logits.argmax(-1)
    taken = torch.tensor(tokens)
    margins = logits.gather(1, best[:, None])[:, 0] - logits.gather(1, taken[:, None])[:, 0]
    steps = (best != taken).nonzero()[:, 0].tolist()
    divergences = [Divergence(step, int(best[step]), tokens[step], float(margins[step])) for step in steps]
    return GreedyCheck(
        len(tokens),
        len(tokens) - len(steps),
        divergences[0] if divergences else None,
        max(divergences, key=lambda divergence: divergence.margin, default=None),
    )
