"""How long a step takes over several rows."""

from __future__ import annotations

from time import perf_counter

from qrun.backends.session import Session
from qrun.decoding.slots import Slots


def step_seconds(session: Session, rows: int, *, depth: int = 256, steps: int = 4) -> float:
    """Seconds of one step in which every row has one token decoded, the shortest of some.

    Whatever else a machine does only adds to a step, so the shortest says most of the model.

    Args:
        session: the model.
        rows: how many.
        depth: tokens that each row holds before.
        steps: that are counted, after one to warm up.

    Raises:
        QrunError: more memory than the machine has left, or rows that this model has not.
    """
    slots = Slots(session, rows)
    ids = [1] * min(depth, session.manifest.model.context_length - steps - 1)
    slots.feed(0, ids, logits="none")
    states = slots.copy_out(0, 0, len(ids))
    for row in range(1, rows):
        slots.copy_in(row, ids, states)
    found = []
    for _ in range(steps + 1):
        started = perf_counter()
        slots.step([1] * rows)
        found.append(perf_counter() - started)
    return min(found[1:])
