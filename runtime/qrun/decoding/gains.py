"""When guesses are worth a try: how often they come true, and what steps of several tokens take."""

from __future__ import annotations

# How many guesses a step may have.
COUNTS = (1, 2, 3, 5, 7, 11, 15)
# Until it is measured, a step of n tokens is taken to last as long as 1 + (n - 1) * _SHARE steps of one.
_SHARE = 0.25
# Guesses are tried where so many times the tokens are expected that single steps give in the same time.
_WORTH = 1.05
# The shortest of so many first steps of a kind counts, since the very first one takes longer than the others.
_FIRST = 3
# Each observation multiplies the weight of the earlier ones by this.
_FADING = 0.95


class Share:
    """How often guesses of some kind came true, the latest counting most.

    Args:
        hope: the share that is taken to come true before anything is seen.
        weight: of the hope, in observations.
    """

    def __init__(self, hope: float, weight: float) -> None:
        self._true, self._all = hope * weight, weight

    @property
    def value(self) -> float:
        return self._true / self._all

    def see(self, came_true: bool) -> None:
        """A guess was judged, and all before it in the same step came true."""
        self._true = self._true * _FADING + came_true
        self._all = self._all * _FADING + 1

    def see_step(self, tried: int, came_true: int) -> None:
        """A step was judged: the guesses behind the first wrong one say nothing."""
        for _ in range(came_true):
            self.see(True)
        if came_true < tried:
            self.see(False)


class StepCosts:
    """Seconds that a step takes, by the number of its tokens."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._counted: dict[int, int] = {}

    def took(self, count: int, seconds: float) -> None:
        """A step of ``count`` tokens was measured."""
        before = self._seconds.get(count)
        counted = self._counted[count] = self._counted.get(count, 0) + 1
        if before is not None and counted <= _FIRST:  # the very first one may have been slow
            self._seconds[count] = min(before, seconds)
            return
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

    @property
    def single(self) -> float | None:
        """Seconds of a step of one token, None before the first."""
        return self._seconds.get(1)


def worth(share: float, available: int, costs: StepCosts, each: float = 0.0) -> int:
    """How many guesses gain most; 0 where none are worth a try.

    Args:
        share: how often a guess comes true, if all before it in the step did.
        available: how many there are at most.
        costs: of steps.
        each: what it takes to find one guess, in steps of one token.
    """
    best, gain = 0, _WORTH
    for count in COUNTS:
        if count > available:
            break
        expected = sum(share**place for place in range(count + 1))
        found = expected / (costs.of(count + 1) + count * each)
        if found > gain:
            best, gain = count, found
    return best
