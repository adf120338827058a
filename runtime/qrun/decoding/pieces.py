"""Where prompts are cut into pieces: at places that depend on the prompt alone, whatever else runs."""

from __future__ import annotations

# Tokens that are kept and reused together; cuts are multiples of it.
GRAIN = 64
# Tokens of a piece where others wait for it: half of what is fastest, which costs some percent.
PIECE = 128
# Behind so many pieces attention takes as long as all other products of one, so they are half as long.
_HALVED_BEHIND = 14


class Pieces:
    """The cuts of every prompt.

    A prompt of up to two pieces is read in one. The pieces of a longer one are those of any other long one
    that begins alike, so what was read of one up to a cut is what reading the other would give.

    Args:
        length: tokens of a piece; a multiple of ``grain``, or shorter.
        grain: pieces far from the beginning are half as long, but no shorter than this.
        even: all pieces have the same length, however long they take.
    """

    def __init__(self, length: int, grain: int = GRAIN, *, even: bool = False) -> None:
        self._length, self._even = length, even
        self._half = length if even else max(min(grain, length), length // 2 // grain * grain)
        self._halved = _HALVED_BEHIND * length

    def end(self, start: int, total: int) -> int:
        """Where the piece ends that begins at ``start``, of a prompt of ``total`` tokens."""
        if self._is_one(total):
            return total
        length = self._length if start < self._halved else self._half
        return min(total, (start // length + 1) * length)

    def whole(self, place: int, total: int) -> int:
        """The last cut at ``place`` or before it, in a prompt of ``total`` tokens; 0 if there is none."""
        if self._is_one(total):
            return 0
        length = self._length if place < self._halved else self._half
        return place // length * length

    def work(self, start: int, tokens: int) -> float:
        """How long ``tokens`` from ``start`` on take, roughly: 2 is what a step may spend on prompts.

        The weights are read for every piece, however short it is, and attention adds to it.
        """
        if self._even:
            return 2.0
        return max(0.5, tokens / self._length) * (1 + start / self._halved)

    def _is_one(self, total: int) -> bool:
        return not self._even and total <= 2 * self._length
