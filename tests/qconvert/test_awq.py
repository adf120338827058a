"""Balanced inputs and weights rounded in groups: the model stays what it is, and gains.

If these fail, ``--recipe awq`` is less exact than it could be, or writes another model.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qconvert.calibration import statistics
from qconvert.calibration.awq import Balancing, group_of
from qconvert.calibration.helper import helpers
from qconvert.calibration.statistics import InputStatistics, Pass
from qconvert.calibration.text import calibration_text
from qconvert.calibration.walk import Walk
from qconvert.checkpoint.load import load_model, open_checkpoint
from qconvert.checkpoint.reference import Reference
from qconvert.formats.blocks import pack, unpack
from qconvert.formats.folding import Folding
from qconvert.formats.recipe import BlockFormat, Recipe
from tests.qconvert.test_smoothing import FoldedSource
from tests.tiny import make_tiny_checkpoint

TOKENS = [*range(1, 30)] * 2
FORMAT = BlockFormat(4, 32, symmetric=False, scale_dtype="bfloat16")
RECIPE = Recipe("int4", "float32", FORMAT, None)


@pytest.fixture(scope="module", params=[{}, {"sliding": True}, {"dtype": "bfloat16"}], ids=str)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("model") / "c"
    # Two query heads to a value head, and groups of columns with a rest.
    return load_model(open_checkpoint(make_tiny_checkpoint(folder, intermediate_size=288, **request.param)))


@pytest.fixture(scope="module")
def sequences(model) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, model.config.vocab_size, (6, 64), generator=generator).tolist()


def balanced(model, sequences, recipe: Recipe = RECIPE, processes: int = 0):
    factors, rounded = {}, {}
    with helpers(processes) as others:
        for found, packed in Walk(model, Balancing(recipe), sequences).rounded(others):
            factors |= found
            rounded |= packed
    return factors, rounded


def seen_by_pytorch(model, sequences, name: str) -> torch.Tensor:
    """The inputs of a product, ``[tokens, K]``, by transformers' own hooks in float32."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _, given: seen.append(given[0].flatten(0, 1))
    )
    try:
        Reference(model).hidden_states(sequences)
    finally:
        handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pass_sees_what_pytorch_computes(
    model, sequences, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "product_dtype", lambda: dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    walk = Pass(model, sequences)
    for layer in range(model.config.num_hidden_layers):
        names = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
        true = {name: seen_by_pytorch(model, sequences, f"model.layers.{layer}.{name}") for name in names}
        seen = {name: InputStatistics(inputs.shape[1], 64, walk.tokens) for name, inputs in true.items()}
        walk.layer(layer, {name: found.add for name, found in seen.items()})
        for name, inputs in true.items():
            due = inputs.t() @ inputs / len(inputs)
            scale = due.diagonal().mean()
            assert float((seen[name].squares - due.diagonal()).abs().max() / due.diagonal().max()) < tolerance
            start = 0
            for run in seen[name].products:
                for group in run:
                    part = slice(start, start + len(group))
                    assert float((group - due[part, part]).abs().mean() / scale) < tolerance
                    start += len(group)
            assert start == inputs.shape[1]


def test_a_balanced_model_computes_the_same(model, sequences) -> None:
    factors, _ = balanced(model, sequences)
    assert len(factors) == 4 * model.config.num_hidden_layers
    for found, factor in factors.items():
        assert float(factor.log().abs().max()) > 0.05, f"{found.divided} is left as it is"
        assert float(factor.log().mean().abs()) < 0.01
    true = Reference(model).logits(TOKENS)
    ours = Reference(model, FoldedSource(model, Folding.of_inputs(factors))).logits(TOKENS)
    assert float(abs(ours - true).max()) < 1e-3


@pytest.mark.parametrize("part", ["v_proj.weight", "v_proj.bias", "o_proj.weight"])
def test_half_a_fold_of_the_values_is_noticed(model, sequences, part: str) -> None:
    """Values and their biases are divided, each by the factor of its own value head."""
    factors, _ = balanced(model, sequences)
    whole = Folding.of_inputs({found: factor for found, factor in factors.items() if found.of_values})
    divided, multiplied = (
        {name: factor for name, factor in table.items() if not name.endswith(part)}
        for table in (whole.divided, whole.multiplied)
    )
    assert len(divided) + len(multiplied) < len(whole.divided) + len(whole.multiplied)
    true = Reference(model).logits(TOKENS)
    ours = Reference(model, FoldedSource(model, Folding(divided, multiplied))).logits(TOKENS)
    assert float(abs(ours - true).max()) > 1e-2


def test_products_are_nearer_than_those_of_rounding_to_nearest(model, sequences) -> None:
    factors, rounded = balanced(model, sequences)
    folding = Folding.of_inputs(factors)
    tensors, better = dict(model.named_parameters()), 0
    for name, packed in rounded.items():
        inputs = seen_by_pytorch(model, sequences, name.removesuffix(".weight"))
        weight = tensors[name].detach().float()
        stored = folding.undo(name, unpack(packed, FORMAT, weight.shape[1]))
        nearest = unpack(pack(weight, FORMAT), FORMAT, weight.shape[1])
        ours, theirs = (((each - weight) @ inputs.t()).norm() for each in (stored, nearest))
        better += bool(ours < 0.9 * theirs)
    assert better == len(rounded) == 7 * model.config.num_hidden_layers


def test_eight_bits_are_rounded_to_nearest_of_the_balanced_weights(model, sequences) -> None:
    eight = BlockFormat(8, 32, symmetric=True, scale_dtype="bfloat16")
    factors, rounded = balanced(
        model, sequences, Recipe("int4", "float32", FORMAT, None, exceptions={"down_proj": eight})
    )
    folding, tensors = Folding.of_inputs(factors), dict(model.named_parameters())
    name = "model.layers.1.mlp.down_proj.weight"
    due = pack(folding.apply(name, tensors[name].detach()), eight)
    assert torch.equal(rounded[name].data, due.data)


def test_a_text_of_zeros_and_dead_channels_is_balanced_too(tmp_path: Path) -> None:
    """A column that nothing reads or that is never anything but zero has no size of its own."""
    from safetensors.torch import load_file, save_file

    folder = make_tiny_checkpoint(tmp_path / "c")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"][5] = 0
    tensors["model.layers.1.mlp.up_proj.weight"][7] = 0
    tensors["model.layers.1.mlp.down_proj.weight"][:, 9] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    dead = load_model(open_checkpoint(folder))
    text = calibration_text(None, folder, 320, 64, 1024)
    factors, rounded = balanced(dead, text.sequences)
    assert all(bool(torch.isfinite(factor).all()) and float(factor.min()) > 0 for factor in factors.values())
    assert all(bool(torch.isfinite(packed.scales.float()).all()) for packed in rounded.values())
    true = Reference(dead).logits(TOKENS)
    assert (
        float(
            abs(Reference(dead, FoldedSource(dead, Folding.of_inputs(factors))).logits(TOKENS) - true).max()
        )
        < 1e-2
    )


@pytest.mark.parametrize(
    ("columns", "block", "due"),
    [
        (576, 64, 192),
        (896, 128, 128),
        (4864, 256, 256),
        (896, 256, 256),
        (896, 32, 224),
        (96, 32, 96),
        (40, 16, 40),
    ],
)
def test_groups_are_whole_blocks(columns: int, block: int, due: int) -> None:
    assert group_of(columns, BlockFormat(4, block, symmetric=False)) == due
