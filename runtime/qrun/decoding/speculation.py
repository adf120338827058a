"""Several tokens in one step: guesses that the model checks all at once, and how many are worth a try.

A step over a token and k guesses after it costs less than k + 1 steps, since the weights are read once.
The sequence takes its tokens from the step's logits one after the other, as from single steps, and goes on
as long as its own choice is the guess: so an answer does not depend on what was guessed, sampled ones
included, but for the last bits in which logits of several positions differ from those of one
(docs/life-of-a-token.md).

It must not cost more than it gains. How often guesses come true is watched also where none is tried, and what
a step of so many tokens takes is measured while it is used.

Source: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding" (arXiv:2211.17192).
"""

from __future__ import annotations

from collections.abc import Sequence as Tokens

from qrun.decoding.guesses import TextGuesses
from qrun.decoding.sequence import Sequence

# How many guesses a step may have.
_COUNTS = (1, 2, 3, 5, 7, 11, 15)
# Until it is measured, a step of n tokens is taken to last as long as 1 + (n - 1) * _SHARE steps of one.
_SHARE = 0.25
# Guesses are tried where so many times the tokens are expected that single steps give in the same time.
_WORTH = 1.05
# Before anything is seen, this share of the guesses is taken to come true, with the weight of so many
# observations. It is too little for a try: a text has to show first that it repeats itself.
_HOPE, _SEEN = 0.25, 3.0
# Each observation multiplies the weight of the earlier ones by this.
_FADING = 0.95
# Guesses are judged by the length of their match, which makes them more likely: up to 2 tokens, up to 4, ...
_LENGTHS = (2, 4, 8, 16)


class _Share:
    """How often guesses after matches of some length came true, the latest counting most."""

    def __init__(self) -> None:
        self._true, self._all = _HOPE * _SEEN, _SEEN

    @property
    def value(self) -> float:
        return self._true / self._all

    def see(self, came_true: bool) -> None:
        self._true = self._true * _FADING + came_true
        self._all = self._all * _FADING + 1


class StepCosts:
    """Seconds that a step takes, by the number of its tokens."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}

    def took(self, count: int, seconds: float) -> None:
        """A step of ``count`` tokens was measured."""
        before = self._seconds.get(count)
        # A single slow step mostly has a cause outside of the model, so none counts for more than twice what
        # steps of this many tokens took so far.
        self._seconds[count] = seconds if before is None else 0.8 * before + 0.2 * min(seconds, 2 * before)

    def of(self, count: int) -> float:
        """What a step of ``count`` tokens takes, in steps of one token."""
        single = self._seconds.get(1)
        if single is None or count == 1:
            return 1 + (count - 1) * _SHARE
        if count in self._seconds:
            return self._seconds[count] / single
        # In proportion to the nearest shorter step that was measured.
        nearest = max((each for each in self._seconds if each < count), default=1)
        share = (self._seconds[nearest] / single - 1) / (nearest - 1) if nearest > 1 else _SHARE
        return 1 + (count - 1) * max(share, 0.0)


class Speculation:
    """What has been learnt of guesses and steps; kept for all answers of one conversation.

    Attributes:
        guessed, accepted: tokens of all answers so far that were tried, and those of them that came true.
    """

    def __init__(self) -> None:
        self.guessed = self.accepted = 0
        self._costs = StepCosts()
        self._shares = [_Share() for _ in range(len(_LENGTHS) + 1)]
        self._of: Sequence | None = None
        self._text = TextGuesses()
        self._taken = 0
        self._watched: tuple[int, _Share] | None = None

    def guess(self, sequence: Sequence) -> list[int]:
        """Tokens to try after the last one of an answer; none where they would not pay.

        The answer has at least one token. ``learn`` is told what became of them, before the next step.
        """
        if sequence is not self._of:
            self._of, self._text, self._taken = sequence, TextGuesses(sequence.prompt_ids), 0
        new = sequence.token_ids[self._taken :]
        self._text.extend(new)
        self._taken += len(new)
        found, length = self._text.guess(min(_COUNTS[-1], sequence.room - 1))
        if not found:
            self._watched = None
            return []
        share = self._shares[sum(length > most for most in _LENGTHS)]
        self._watched = (found[0], share)
        return found[: self._worth(share.value, len(found))]

    def learn(self, guesses: Tokens[int], came_true: int, seconds: float) -> None:
        """What became of a step.

        Args:
            guesses: what was tried in it, after the last token.
            came_true: how many of them were the sequence's choice, from the first one on.
            seconds: that the model took.
        """
        self._costs.took(1 + len(guesses), seconds)
        self.guessed += len(guesses)
        self.accepted += came_true
        if self._watched is None or self._of is None:
            return
        first, share = self._watched
        if not guesses:  # nothing was tried, but it can be seen whether the guess was right
            share.see(self._of.token_ids[self._taken :][:1] == [first])
            return
        for _ in range(came_true):
            share.see(True)
        if came_true < len(guesses):
            share.see(False)

    def _worth(self, share: float, available: int) -> int:
        """How many guesses gain most, if each comes true this often after others that did; 0 for none."""
        best, gain = 0, _WORTH
        for count in _COUNTS:
            if count > available:
                break
            expected = sum(share**place for place in range(count + 1))
            if expected / self._costs.of(count + 1) > gain:
                best, gain = count, expected / self._costs.of(count + 1)
        return best
