"""The proof of logits in two steps: is the second step there, for the right tokens, in the right size?

A divergence does not tell: what the second step adds is smaller than what limits must allow to 4 bits.
But it is known exactly. Where d is what it should add to the logit of a token of the shortlist, an export
without it is off by -d, and one that is right is off by rounding that knows nothing of d. So the share

    missing = sum(-d · (ours - PyTorch's)) / sum(d · d)

over all positions is near 0 where the step is right, and 1 where it is missing or done to other tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from qconvert.proof.limits import limit_value
from qconvert.proof.weight_check import WeightCheck, WeightFault

if TYPE_CHECKING:
    import torch

    from qconvert.checkpoint.reference import Reference


class HeadProof:
    """Collects the share while logits are compared; for an export of one step it does nothing."""

    def __init__(self) -> None:
        self._crossed = self._squares = 0.0
        self._steps: tuple[torch.Tensor, torch.Tensor] | None = None
        self._chosen: torch.Tensor | None = None

    def logits(self, reference: Reference, hidden: torch.Tensor) -> torch.Tensor:
        """``reference.head(hidden)``; its steps are kept for the comparisons that follow."""
        steps = reference.two_steps(hidden)
        if steps is None:
            return reference.head(hidden)
        assert reference.shortlist is not None
        self._steps, self._chosen = steps, reference.shortlist.tokens(steps[0])
        return reference.shortlist.apply(*steps)

    def compare(self, ours: torch.Tensor) -> None:
        """Take up an export's logits ``[positions, vocab]``: of the last positions of ``logits``."""
        if self._steps is None or self._chosen is None:
            return
        chosen = self._chosen[-len(ours) :]
        coarse, exact = (step[-len(ours) :].gather(1, chosen).double() for step in self._steps)
        due = exact - coarse
        off = ours.gather(1, chosen).double() - exact
        # Softmax ignores a constant shift: compare without the mean.
        due, off = (values - values.mean(1, keepdim=True) for values in (due, off))
        self._crossed -= float((due * off).sum())
        self._squares += float((due * due).sum())

    @property
    def missing(self) -> float:
        """The share of the second step that is missing."""
        return self._crossed / self._squares if self._squares else 0.0

    def with_faults(self, check: WeightCheck, limits: str) -> WeightCheck:
        """The outcome of the weights, with this one's."""
        if not self._squares or abs(self.missing) <= limit_value("second_step", limits):
            return check
        fault = WeightFault(
            "lm_head.weight", f"{self.missing:.0%} of the second step of the shortlist's logits is missing"
        )
        return replace(check, faults=(*check.faults, fault))
