"""If these fail, chance looks like an effect of quantisation, or an effect like chance."""

from __future__ import annotations

import numpy as np
import pytest

from qrun.evaluation.asking import Result
from qrun.evaluation.statistics import bootstrap, most_changed, wilson
from qrun.evaluation.summary import changed, measures
from qrun.evaluation.tasks import Task


def mean(columns):
    return bootstrap(columns[:, None], lambda sums: sums[..., 0] / len(columns), seed=3)


def test_the_interval_of_a_mean_is_that_of_its_distribution():
    """Beside the normal approximation, which is good for 400 numbers."""
    values = np.random.default_rng(1).normal(5, 2, 400)
    found = mean(values)
    half = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.02)
    assert found.high == pytest.approx(values.mean() + half, abs=0.02)


def test_nineteen_of_twenty_intervals_hold_the_true_mean():
    draws = np.random.default_rng(2)
    held = 0
    for _ in range(200):
        found = mean(draws.binomial(1, 0.4, 150).astype(float))
        held += found.low <= 0.4 <= found.high
    assert 180 <= held <= 198  # 190 expected, with a standard deviation of 3


def test_the_same_seed_gives_the_same_interval_also_in_pieces(monkeypatch):
    values = np.random.default_rng(1).normal(size=50)
    whole = mean(values)
    assert mean(values) == whole
    monkeypatch.setattr("qrun.evaluation.statistics._AT_ONCE", 50 * 700)  # a generator draws on where it was
    assert mean(values) == whole


@pytest.mark.parametrize(
    ("right", "lines", "low", "high"), [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (15, 50, 0.1910, 0.4375)]
)
def test_a_share_has_wilsons_interval(right, lines, low, high):
    found = wilson(right, lines)
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_where_nothing_changed_the_bound_is_the_share_that_hides_in_one_of_twenty_cases():
    assert (1 - most_changed(20)) ** 20 == pytest.approx(0.05)
    assert most_changed(300) == pytest.approx(3 / 300, rel=0.01)


def tasks(kinds, groups=None):
    groups = groups or [None] * len(kinds)
    return [
        Task(place, f"line {place}", kind, group, text="four" if kind == "perplexity" else "")
        for place, (kind, group) in enumerate(zip(kinds, groups), 1)
    ]


def rights(text):
    return [Result(letter == "+") for letter in text]


def test_a_pair_that_always_differs_alike_is_beyond_chance_although_both_shares_are_uncertain():
    """Paired: each folder alone has an interval of 20 points, their difference none that holds zero."""
    lines = tasks(["contains"] * 80)
    first, second = "+" * 40 + "-" * 40, "+" * 30 + "-" * 50
    (measure,) = measures(lines, ["a", "b"], [rights(first), rights(second)], seed=0)
    a, b = measure.figures
    assert (a.value.value, b.value.value) == (0.5, 0.375)
    assert a.value.low < b.value.high
    assert b.change is not None
    assert (b.change.lost, b.change.won) == (10, 0)
    assert b.change.difference.value == pytest.approx(-0.125)
    assert -0.22 < b.change.difference.low < b.change.difference.high < -0.04


def test_lines_that_were_lost_and_won_are_counted_where_the_shares_are_equal():
    lines = tasks(["contains"] * 4)
    found = [rights("++--"), rights("+-+-")]
    (measure,) = measures(lines, ["a", "b"], found, seed=0)
    change = measure.figures[1].change
    assert (change.lost, change.won, change.difference.value) == (1, 1, 0)
    assert changed(lines, found) == [1, 2]


def test_kinds_and_groups_have_measures_of_their_own():
    lines = tasks(["contains", "contains", "exact", "choice"], ["x", "y", "x", None])
    results = [*rights("+-+"), Result(True, probability=0.5)]
    found = measures(lines, ["a"], [results], seed=0)
    names = [(each.name, each.group, each.lines) for each in found]
    assert names == [
        ("exact", None, 1),
        ("contains", None, 2),
        ("contains", "x", 1),
        ("contains", "y", 1),
        ("choice", None, 1),
        ("probability", None, 1),
    ]
    assert all(each.figures[0].change is None for each in found)


def texts(*nats_and_tokens):
    return [Result(nats=nats, tokens=tokens) for nats, tokens in nats_and_tokens]


def test_perplexity_is_of_all_tokens_together_and_its_change_a_ratio():
    lines = tasks(["perplexity"] * 2)
    found = [texts((20, 10), (60, 40)), texts((25, 10), (75, 40))]
    (measure,) = measures(lines, ["a", "b"], found, seed=0)
    first, second = measure.figures
    assert measure.name == "perplexity"
    assert first.value.value == pytest.approx(np.exp(80 / 50))
    assert second.change.difference.value == pytest.approx(np.exp(20 / 50) - 1)


def test_folders_that_cut_texts_into_other_tokens_are_compared_by_bytes():
    """A perplexity per token of another tokenizer is another quantity."""
    lines = tasks(["perplexity"] * 2)
    found = [texts((20, 10), (60, 40)), texts((25, 12), (75, 44))]
    (measure,) = measures(lines, ["a", "b"], found, seed=0)
    assert measure.name == "bits"
    assert measure.figures[0].value.value == pytest.approx(80 / 8 / np.log(2))
    assert measure.figures[1].change.difference.value == pytest.approx(0.25)
