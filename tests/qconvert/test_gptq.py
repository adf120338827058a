"""GPTQ's arithmetic: errors go where the inputs do not see them, and what is packed is what was solved."""

from __future__ import annotations

import pytest
import torch

from qconvert.calibration.gptq.solve import Means, inverse_factor, solve, solve_groups
from qconvert.calibration.steps import search_steps
from qconvert.formats.blocks import assemble, pack, unpack
from qconvert.formats.recipe import BlockFormat

FORMATS = [
    BlockFormat(4, size, symmetric, scale_dtype)
    for size in (16, 64, 256)
    for symmetric in (True, False)
    for scale_dtype in ("float32", "bfloat16")
]


def correlated_inputs(columns: int, tokens: int = 2048, seed: int = 0) -> torch.Tensor:
    """Inputs with few strong directions, as activations have them."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn((columns, columns), generator=generator) * torch.linspace(2, 0.05, columns)
    return torch.randn((tokens, columns), generator=generator) @ mixed.t() / columns**0.5


def weight(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed)) * 0.05


def squares(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.t() @ inputs / len(inputs)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("columns", [192, 256])  # 192: a last block that is not full
def test_products_are_nearer_than_those_of_rounding_to_nearest(fmt: BlockFormat, columns: int) -> None:
    inputs, original = correlated_inputs(columns), weight(40, columns)
    solved = unpack(solve(original, inverse_factor(squares(inputs)), fmt), fmt, columns)
    nearest = unpack(pack(original, fmt), fmt, columns)
    ours, theirs = (((stored - original) @ inputs.t()).norm().item() for stored in (solved, nearest))
    assert ours < 0.75 * theirs


def test_the_matrix_that_is_solved_stays_as_it_is() -> None:
    original = weight(8, 64)
    before = original.clone()
    solve(original, inverse_factor(squares(correlated_inputs(64))), BlockFormat(4, 32, symmetric=False))
    assert torch.equal(original, before)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_a_weight_on_the_grid_comes_back_as_it_is(fmt: BlockFormat) -> None:
    """No error, nothing to make up for: what is packed and what the columns saw must be the same grid."""
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(0, 16, (6, 256 // fmt.block_size, fmt.block_size), generator=generator)
    codes[..., 0], codes[..., 1] = 0, 15
    original = ((codes - 8) * 0.0625).flatten(1)
    solved = unpack(solve(original, inverse_factor(torch.eye(256)), fmt), fmt, 256)
    assert torch.allclose(solved, original, atol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_search_is_never_worse_than_rounding_to_nearest(symmetric: bool) -> None:
    fmt, values = BlockFormat(4, 32, symmetric), weight(200, 32).t()
    importance = torch.rand(32, generator=torch.Generator().manual_seed(3))
    scales, zeros, errors = search_steps(values, importance, fmt)
    found = (values / scales).round().add(zeros).clamp(0, 15).sub(zeros) * scales
    nearest = unpack(pack(values.t().contiguous(), fmt), fmt, 32).t()
    ours, theirs = (((stored - values).square() * importance[:, None]).sum(0) for stored in (found, nearest))
    assert bool((ours <= errors * (1 + 1e-3)).all())  # what is told is what is there, or a little more
    assert float(errors.sum()) < 1.02 * float(ours.sum())
    assert bool((ours <= theirs * (1 + 1e-5)).all())
    assert float(ours.sum()) < 0.95 * float(theirs.sum())


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_blocks_of_zeros_stay_zeros(fmt: BlockFormat) -> None:
    solved = solve(torch.zeros(4, 256), inverse_factor(torch.eye(256)), fmt)
    assert torch.equal(unpack(solved, fmt, 256), torch.zeros(4, 256))


def test_inputs_that_are_always_zero_or_all_alike_can_be_solved() -> None:
    """A dead channel, and fewer tokens than channels: the matrix has no inverse of its own."""
    inputs = correlated_inputs(64, tokens=5)
    inputs[:, 7] = 0
    inputs[:, 9] = inputs[:, 8]
    fmt = BlockFormat(4, 32, symmetric=False)
    solved = unpack(solve(weight(8, 64), inverse_factor(squares(inputs)), fmt), fmt, 64)
    assert bool(torch.isfinite(solved).all())
    inverse_factor(torch.zeros(8, 8))


def test_a_layer_mends_what_the_layers_before_have_broken() -> None:
    """Inputs were changed by a known matrix: the weights that undo it give the true products again."""
    true = correlated_inputs(64)
    mixing = torch.eye(64) + 0.1 * torch.randn((64, 64), generator=torch.Generator().manual_seed(4))
    rounded, original = true @ mixing, weight(8, 64)
    means = Means(squares(rounded), true.t() @ rounded / len(true))
    mended, unmended = (
        (rounded @ matrix.t() - true @ original.t()).norm().item()
        for matrix in (means.aim(original), original)
    )
    assert mended < 0.2 * unmended


def test_inputs_that_are_not_finite_are_told() -> None:
    bad = torch.eye(8)
    bad[3, 3] = float("nan")
    assert not Means(bad, torch.eye(8)).finite
    assert not Means(torch.eye(8), bad).finite
    assert Means(torch.eye(8), torch.eye(8)).finite


def test_groups_are_solved_as_if_each_stood_alone() -> None:
    fmt, original = BlockFormat(4, 32, symmetric=False), weight(20, 192)
    uppers = torch.stack([inverse_factor(squares(correlated_inputs(96, seed=seed))) for seed in (5, 6)])
    whole = unpack(assemble(*solve_groups(original, uppers, fmt), fmt), fmt, 192)
    for group, upper in enumerate(uppers):
        part = slice(96 * group, 96 * (group + 1))
        alone = unpack(solve(original[:, part].contiguous(), upper, fmt), fmt, 96)
        torch.testing.assert_close(whole[:, part], alone)
