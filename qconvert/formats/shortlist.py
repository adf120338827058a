"""Logits in two steps: all of them from half of the head's bits, the likeliest again from all bits.

Decoding one token reads the whole head, a third of a small model's bytes. The first step reads half of it
and only has to find the tokens that matter; the second reads some hundred rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Mean KL that it costs the sample on prose: 0.027 with 64 tokens, 0.015 with 256, 0.010 with 512.
SIZE = 256
# With fewer tokens than this many times the shortlist, the first step would save too little.
_LEAST_RATIO = 16
_RANGES = (2, 1)


@dataclass(frozen=True)
class Shortlist:
    """The ``per_range`` likeliest tokens of each of ``ranges`` equal parts of the vocabulary.

    Two parts are searched in half the time of one (0.22 ms for 150,000 tokens); more parts gain nothing.
    The ``per_range`` likeliest tokens of the whole vocabulary are always among those found.
    """

    ranges: int
    per_range: int

    @classmethod
    def of(cls, size: int, vocab_size: int) -> Shortlist:
        """A shortlist of ``size`` tokens in as many ranges as the vocabulary can be cut into."""
        ranges = next(ranges for ranges in _RANGES if vocab_size % ranges == 0)
        return cls(ranges, size // ranges)

    def apply(self, coarse: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """``logits`` ``[tokens, vocab]`` of the tokens in the shortlist of ``coarse``, else ``coarse``."""
        chosen = self.tokens(coarse)
        return coarse.scatter(1, chosen, logits.gather(1, chosen))

    def tokens(self, coarse: torch.Tensor) -> torch.Tensor:
        """The shortlist of each row of ``coarse`` ``[tokens, vocab]``."""
        import torch

        rows, vocab = coarse.shape
        found = coarse.view(rows, self.ranges, -1).topk(self.per_range).indices
        starts = torch.arange(0, vocab, vocab // self.ranges)
        return (found + starts[:, None]).view(rows, -1)


def worth_it(vocab_size: int) -> bool:
    """Whether a vocabulary is long enough for a shortlist."""
    return vocab_size >= _LEAST_RATIO * SIZE
