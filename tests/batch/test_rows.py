"""If these fail, a batch runs on too few rows, or on so many that memory is gone in the middle of it."""

from __future__ import annotations

import pytest

from qrun.batch import rows
from qrun.batch.rows import choose_rows
from qrun.decoding.step_time import step_seconds
from qrun.errors import QrunError


@pytest.fixture
def measured(monkeypatch):
    """Seconds of a step by rows, as a test says; what was measured."""
    asked: list[int] = []

    def machine(seconds, free=None):
        def step(session, count):
            asked.append(count)
            return seconds(count)

        monkeypatch.setattr(rows, "step_seconds", step)
        monkeypatch.setattr(rows, "available_memory", lambda: free)
        return asked

    return machine


def test_rows_are_doubled_as_long_as_that_is_worth_it(model, measured):
    asked = measured(lambda count: max(1.0, count / 8))  # eight rows cost as much as one, then all cost
    found = choose_rows(model, lines=1000, tokens=500)
    assert (found.count, asked) == (8, [1, 2, 4, 8, 16, 32])
    assert "32 would give 8 tokens/s instead of 8" in found.why


def test_a_step_without_gain_does_not_hide_the_next_one(model, measured):
    """A processor that computes 16 rows at once gains nothing from 4 to 8."""
    measured(lambda count: 1.0 if count <= 4 else 2.0 if count <= 16 else count / 8)
    assert choose_rows(model, lines=1000, tokens=500).count == 16


def test_the_reason_is_that_of_the_rows_which_were_chosen(model, measured):
    """It said "128 at once: 8 would give 52 tokens/s instead of 71": 8 had gained nothing, and 16 did."""
    measured(lambda count: 1.0 if count != 8 else 3.0)
    found = choose_rows(model, lines=1000, tokens=500)
    assert (found.count, found.why) == (rows.MOST_ROWS, f"the most are {rows.MOST_ROWS}")


def test_not_more_rows_than_lines(model, measured):
    asked = measured(lambda count: 1.0)
    assert choose_rows(model, lines=5, tokens=500).count == 5
    assert asked == [1, 2, 4, 5]


def test_memory_bounds_rows_by_the_longest_line(model, measured):
    measured(lambda count: 1.0, free=1_000_000 + int(512 * 500 * 10 / 0.6) + 1000)
    found = choose_rows(model, lines=1000, tokens=500, reserved=1_000_000)
    assert (found.count, found.why) == (10, "memory has room for 10 of 500 tokens")


def test_memory_that_lacks_in_a_measurement_is_no_failure(model, measured):
    def seconds(count: int) -> float:
        if count > 4:
            raise QrunError("a KV cache needs more")
        return 1.0

    measured(seconds)
    assert choose_rows(model, lines=1000, tokens=500).count == 4


def test_a_plan_has_one_row(model):
    object.__setattr__(model.session.manifest, "target", "tensorrt")
    assert choose_rows(model, lines=1000, tokens=500).count == 1


def test_every_row_of_a_measurement_holds_a_prompt(model):
    fed = model.session.fed
    assert step_seconds(model.session, 3, depth=100, steps=2) > 0
    assert [len(tokens) for tokens in fed] == [100] + [1] * 9


def test_a_step_that_something_else_slows_down_does_not_count(model, monkeypatch):
    """Eight rows were taken for a batch of sixty: the steps of 16 and 32 had been disturbed."""
    seconds = [9.0, 0.5, 3.0, 0.25, 3.0]  # the first one warms up
    ticks = [tick for taken in seconds for tick in (0.0, taken)]
    monkeypatch.setattr("qrun.decoding.step_time.perf_counter", lambda: ticks.pop(0))
    assert step_seconds(model.session, 2, depth=10) == 0.25
