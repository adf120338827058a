"""GPTQ's arithmetic: errors go where the inputs do not see them, and what is packed is what was solved."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from qconvert.calibration.gptq import moments
from qconvert.calibration.gptq.solve import (
    DAMPING,
    Means,
    inverse_factor,
    solve,
    solve_groups,
    upper_triangle,
)
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


def rounded(original: torch.Tensor, hessian: torch.Tensor, fmt: BlockFormat) -> torch.Tensor:
    packed = assemble(*stored(solve(original, upper_triangle(hessian), fmt), fmt), fmt)
    return unpack(packed, fmt, original.shape[1])


def stored(found, fmt: BlockFormat):
    codes, scales, zeros = found
    return codes, scales, None if fmt.symmetric else zeros


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("columns", [192, 256])  # 192: a last block that is not full
def test_products_are_nearer_than_those_of_rounding_to_nearest(fmt: BlockFormat, columns: int) -> None:
    inputs, original = correlated_inputs(columns), weight(40, columns)
    solved = rounded(original, squares(inputs), fmt)
    nearest = unpack(pack(original, fmt), fmt, columns)
    ours, theirs = (((stored - original) @ inputs.t()).norm().item() for stored in (solved, nearest))
    assert ours < 0.75 * theirs


def test_the_matrix_that_is_solved_stays_as_it_is() -> None:
    original = weight(8, 64)
    before = original.clone()
    solve(original, upper_triangle(squares(correlated_inputs(64))), BlockFormat(4, 32, symmetric=False))
    assert torch.equal(original, before)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_a_weight_on_the_grid_comes_back_as_it_is(fmt: BlockFormat) -> None:
    """No error, nothing to make up for: what is packed and what the columns saw must be the same grid."""
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(0, 16, (6, 256 // fmt.block_size, fmt.block_size), generator=generator)
    codes[..., 0], codes[..., 1] = 0, 15
    original = ((codes - 8) * 0.0625).flatten(1)
    solved = rounded(original, torch.eye(256), fmt)
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
    assert torch.equal(rounded(torch.zeros(4, 256), torch.eye(256), fmt), torch.zeros(4, 256))


def test_inputs_that_are_always_zero_or_all_alike_can_be_solved() -> None:
    """A dead channel, and fewer tokens than channels: the matrix has no inverse of its own."""
    inputs = correlated_inputs(64, tokens=5)
    inputs[:, 7] = 0
    inputs[:, 9] = inputs[:, 8]
    fmt = BlockFormat(4, 32, symmetric=False)
    solved = rounded(weight(8, 64), squares(inputs), fmt)
    assert bool(torch.isfinite(solved).all())
    inverse_factor(torch.zeros(8, 8))
    upper_triangle(torch.zeros(8, 8))


@pytest.mark.parametrize("narrow", [False, True], ids=["inputs", "products"])
def test_a_layer_mends_what_the_layers_before_have_broken(narrow: bool) -> None:
    """Inputs were changed by a known matrix: weights that undo it give the true products again."""
    true = correlated_inputs(64)
    mixing = torch.eye(64) + 0.1 * torch.randn((64, 64), generator=torch.Generator().manual_seed(4))
    inputs, matrices = true @ mixing, {"a": weight(5, 64), "b": weight(70 - 5 * narrow * 13, 64, seed=7)}
    original, missing = torch.cat(list(matrices.values())), true - inputs
    if narrow:
        missing = missing @ original.t()
    fmt = BlockFormat(8, 32, symmetric=False)
    means = Means(squares(inputs), missing.t() @ inputs / len(true), damping=0.01)
    with ThreadPoolExecutor(2) as workers:
        packed = means.solve(matrices, fmt, workers)
    assert list(packed) == ["a", "b"]
    mended = torch.cat([unpack(each, fmt, 64) for each in packed.values()])
    ours, theirs = ((inputs @ found.t() - true @ original.t()).norm().item() for found in (mended, original))
    assert ours < 0.2 * theirs


def test_the_triangle_is_the_inverse_of_the_inverse_factor() -> None:
    hessian = squares(correlated_inputs(96))
    product = upper_triangle(hessian.triu()) @ inverse_factor(hessian.clone(), DAMPING)
    torch.testing.assert_close(product, torch.eye(96), atol=2e-4, rtol=0)


def test_a_matrix_of_several_chunks_is_solved_as_by_the_inverse() -> None:
    """Columns that take what is due at once do as columns to which each error is handed on."""
    hessian, fmt, original = (
        squares(correlated_inputs(384)),
        BlockFormat(4, 32, symmetric=False),
        weight(24, 384),
    )
    upper = inverse_factor(hessian.clone(), DAMPING)
    handed_on = unpack(assemble(*solve_groups(original, upper[None], fmt), fmt), fmt, 384)
    at_once = rounded(original, hessian, fmt)
    assert float((handed_on - at_once).abs().ge(1e-4).float().mean()) < 0.1  # between two steps, either way
    changes = [found - original for found in (at_once, handed_on)]
    ours, theirs = (float((change @ hessian * change).sum()) for change in changes)
    assert 0.98 < ours / theirs < 1.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_are_the_same_whoever_computes_them(dtype: torch.dtype) -> None:
    inputs = [correlated_inputs(200, 512, seed).to(dtype) for seed in range(3)]
    left = [part[:, :90] + 1 for part in inputs]
    found = []
    for count in (1, 3):
        with ThreadPoolExecutor(count) as workers:
            found.append((moments.squares(inputs, workers).triu(), moments.crossed(left, inputs, workers)))
    assert all(torch.equal(*pair) for pair in zip(*found))
    whole, others = torch.cat(inputs).double(), torch.cat(left).double()
    expected = (whole.t() @ whole / 1536).triu(), others.t() @ whole / 1536
    for ours, theirs in zip(found[0], expected):
        limit = 1e-5 if dtype == torch.float32 else 4e-3
        assert float((ours - theirs).abs().max()) < limit * float(theirs.abs().max())


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
        alone = assemble(*solve_groups(original[:, part].contiguous(), upper[None], fmt), fmt)
        alone = unpack(alone, fmt, 96)
        torch.testing.assert_close(whole[:, part], alone)
