"""When guesses are worth a try: how often they come true, and what steps of several tokens take."""

from __future__ import annotations

from collections.abc import Sequence

# How many guesses a step may have.
COUNTS = (1, 2, 3, 5, 7, 11, 15)
# Until it is measured, a step of n tokens is taken to last as long as 1 + (n - 1) * _SHARE steps of one.
_SHARE = 0.25
# The same for a step of n rows, from which that of one row is told while none was alone.
_ROW_SHARE = 0.15
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
    """Seconds that a step takes: of one row, by the number of its tokens, and of rows of one token each."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._counted: dict[int, int] = {}
        self._rows: dict[int, float] = {}
        self._rows_counted: dict[int, int] = {}

    def took(self, count: int, seconds: float) -> None:
        """A step of one row and ``count`` tokens was measured."""
        _see(self._seconds, self._counted, count, seconds)

    def took_together(self, rows: int, seconds: float) -> None:
        """A step of several rows, one token each, was measured."""
        _see(self._rows, self._rows_counted, rows, seconds)

    def of(self, count: int) -> float:
        """What a step of one row and ``count`` tokens takes, in steps of one token."""
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

    def apart(self, rows: int, count: int) -> float | None:
        """What a step of one row and ``count`` tokens takes, in steps of ``rows`` rows and one token each.

        None before such a step was measured. While no row has decoded alone, a step of one follows from that
        of the fewest rows; a first try corrects it.
        """
        together = self._rows.get(rows)
        if together is None:
            return None
        if count in self._seconds:
            return self._seconds[count] / together
        fewest = min(self._rows)
        single = self._seconds.get(1, self._rows[fewest] / (1 + (fewest - 1) * _ROW_SHARE))
        return self.of(count) * single / together


def _see(times: dict[int, float], counted: dict[int, int], kind: int, seconds: float) -> None:
    """Take up what a step of some kind took."""
    before = times.get(kind)
    counted[kind] = counted.get(kind, 0) + 1
    if before is not None and counted[kind] <= _FIRST:  # the very first one may have been slow
        times[kind] = min(before, seconds)
        return
    # A single slow step mostly has a cause outside of the model, so none counts for more than twice what
    # steps of its kind took so far.
    times[kind] = seconds if before is None else 0.8 * before + 0.2 * min(seconds, 2 * before)


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
        found = _expected(share, count) / (costs.of(count + 1) + count * each)
        if found > gain:
            best, gain = count, found
    return best


def worth_apart(rows: Sequence[tuple[float, int]], costs: StepCosts) -> list[int]:
    """How many guesses each of several rows should try, each in a step of its own, one row after the other.

    A graph takes several tokens for one row at a time, so the rows no longer share the weights. It is worth a
    try only where every row gains by it: one that has no guess would wait for the others.

    Args:
        rows: of each row, how often its guesses come true, and how many there are at most.
        costs: of steps.

    Returns:
        One number for each row; all of them 0 where a step of all rows together is as good for one of them.
    """
    none = [0] * len(rows)
    single = costs.apart(len(rows), 1)
    if single is None or min(available for _, available in rows) < 1:
        return none
    # However many are tried, a row gets no more than this, and all rows take no less.
    if min(_expected(share, COUNTS[-1]) for share, _ in rows) <= _WORTH * len(rows) * single:
        return none
    best, gain = none, len(rows) * _WORTH
    chosen, expected, times = list(none), [1.0] * len(rows), [0.0] * len(rows)
    for count in COUNTS:
        time = costs.apart(len(rows), count + 1)
        assert time is not None
        for row, (share, available) in enumerate(rows):
            tokens = _expected(share, count)
            # For each row by itself the number up to here that gives the most tokens for its time.
            if count <= available and (not chosen[row] or tokens / time > expected[row] / times[row]):
                chosen[row], expected[row], times[row] = count, tokens, time
        whole = sum(times)
        if min(expected) > _WORTH * whole and sum(expected) / whole > gain:
            best, gain = list(chosen), sum(expected) / whole
    return best


def _expected(share: float, count: int) -> float:
    """Tokens that a step with ``count`` guesses gives."""
    return count + 1.0 if share >= 1 else (1 - share ** (count + 1)) / (1 - share)
