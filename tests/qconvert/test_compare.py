"""The measures of a verification, on logits whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qconvert.formats.blocks import pack, unpack
from qconvert.formats.recipe import BlockFormat
from qconvert.proof.compare import check_greedy, compare_rows, measure
from qconvert.proof.weight_check import error_in_steps


def test_measures_of_known_distributions() -> None:
    reference = torch.log(torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.25, 0.75]]))
    ours = torch.log(torch.tensor([[0.5, 0.5], [0.1, 0.9], [0.5, 0.5]])) + 1.0
    rows = compare_rows(10, reference, ours, torch.tensor([0, 1]))
    found = measure(rows, text=True)
    assert found.positions == 3
    kl = [0, 0.9 * np.log(9) - 0.1 * np.log(9), 0.25 * np.log(0.5) + 0.75 * np.log(1.5)]
    assert rows.kl == pytest.approx(kl, abs=1e-6)
    assert (found.max_kl, found.max_kl_at) == (pytest.approx(kl[1]), 11)
    assert (found.max_difference, found.max_difference_at) == (pytest.approx(1 + np.log(9)), 11)
    assert rows.agrees.tolist()[:2] == [1, 0]
    assert found.reference_perplexity == pytest.approx((0.5 * 0.1) ** -0.5)
    assert found.export_perplexity == pytest.approx((0.5 * 0.9) ** -0.5)
    assert measure(rows, text=False).perplexity_ratio is None


def test_a_row_that_is_not_finite_is_above_every_limit() -> None:
    reference = torch.zeros(3, 4)
    for bad in (float("nan"), float("inf"), float("-inf")):
        ours = reference.clone()
        ours[1, 2] = bad
        rows = compare_rows(0, reference, ours, torch.tensor([0, 0, 0]))
        assert rows.non_finite_at == 1
        assert rows.first_above("max_difference", 1e9) == 1


@pytest.mark.parametrize(
    ("gap", "outcome"), [(-1.0, "identical"), (0.0019, "near tie"), (0.0021, "different"), (3.0, "different")]
)
def test_a_near_tie_is_told_from_an_error(gap: float, outcome: str) -> None:
    # At step 2 token 5 was taken; PyTorch's logit of token 7 is larger by the gap.
    logits = torch.zeros(4, 10)
    logits[torch.arange(4), torch.tensor([1, 2, 5, 3])] = 8.0
    logits[2, 7] = 8.0 + gap
    check = check_greedy([1, 2, 5, 3], logits)
    assert check.outcome(2e-3) == outcome
    assert check.agreed == (4 if outcome == "identical" else 3)
    if outcome != "identical":
        assert check.first is not None
        assert (check.first.step, check.first.expected, check.first.taken) == (2, 7, 5)
        assert check.first.margin == pytest.approx(gap, abs=1e-5)


def test_one_wide_margin_is_not_hidden_by_a_near_tie_before_it() -> None:
    logits = torch.zeros(2, 3)
    logits[0, 1], logits[1, 2] = 1e-3, 5.0
    check = check_greedy([0, 0], logits)
    assert check.first is not None
    assert check.first.step == 0
    assert check.outcome(2e-3) == "different"


@pytest.mark.parametrize(
    "fmt", [BlockFormat(4, 32, False), BlockFormat(4, 16, True), BlockFormat(8, 64, True)]
)
def test_rounding_to_nearest_leaves_half_a_step(fmt: BlockFormat) -> None:
    weight = torch.randn(40, 200, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    weight[4] = weight[4].abs() + 1
    stored = unpack(pack(weight, fmt), fmt, 200)
    steps = error_in_steps(weight, stored, fmt)
    assert 0.45 < float(steps.max()) <= 0.501
    assert float(steps[3].max()) == 0
    stored[7, 33] += 1.1 * (weight[7].max() - weight[7].min()) / ((1 << fmt.bits) - 1)
    assert float(error_in_steps(weight, stored, fmt)[7].max()) > 0.501
