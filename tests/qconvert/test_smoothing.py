"""If these fail, a folded model is another model, or the proof does not see that it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qconvert.calibration import statistics
from qconvert.calibration.observer import ColumnSizes, Observer, observe
from qconvert.calibration.smoothing import factors_for, folding_for
from qconvert.calibration.text import calibration_text
from qconvert.checkpoint.load import load_model, open_checkpoint
from qconvert.checkpoint.reference import Reference
from qconvert.checkpoint.weights import CheckpointWeights
from qconvert.formats.folding import FoldedWeights, Folding, folded_inputs
from qconvert.recipes.precisions import recipe_for
from tests.tiny import make_tiny_checkpoint

TOKENS = [3, 17, 200, 45, 9, 120, 77, 31, 256, 8, 64, 90]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("smoothing") / "tiny", dtype="bfloat16")


@pytest.fixture
def model(tiny: Path):
    return load_model(open_checkpoint(tiny))


@pytest.fixture
def folding(tiny: Path, model) -> Folding:
    return folding_on(model, calibration_text(None, tiny, 320, 256, 600).sequences)


def folding_on(model, sequences) -> Folding:
    recipe = recipe_for("int8", model.config.hidden_size)
    observer = Observer(recipe, model.config.num_hidden_layers)
    observe(model, sequences, observer)
    return folding_for(recipe, model, observer)


class FoldedSource:
    """The folded model's tensors, for PyTorch to compute with."""

    description = "folded"
    shortlist = None

    def __init__(self, model, folding: Folding) -> None:
        self._weights = FoldedWeights(CheckpointWeights(model), folding)

    def __contains__(self, name: str) -> bool:
        return name in self._weights

    def rows(self, name: str, rows):
        return self._weights[name][rows].float()

    def release(self, name: str) -> None:
        self._weights.release(name)


def difference(model, folding: Folding) -> float:
    true = Reference(model).logits(TOKENS)
    return float(abs(Reference(model, FoldedSource(model, folding)).logits(TOKENS) - true).max())


def test_a_folded_model_has_the_same_logits(model, folding):
    factors = torch.cat(list(folding.divided.values()))
    assert float(factors.max() / factors.min()) > 2, "nothing is folded: the comparison shows nothing"
    assert difference(model, folding) < 1e-4


def without(table: str, ending: str) -> Callable[[Folding], Folding]:
    """A folding that forgets some tensors."""

    def forget(folding: Folding) -> Folding:
        kept = {name: factor for name, factor in getattr(folding, table).items() if not name.endswith(ending)}
        assert len(kept) < len(getattr(folding, table))
        return replace(folding, **{table: kept})

    return forget


@pytest.mark.parametrize(
    "forget",
    [
        without("divided", "input_layernorm.weight"),
        without("divided", "1.post_attention_layernorm.weight"),
        without("divided", "up_proj.weight"),
        without("multiplied", "0.self_attn.k_proj.weight"),
        without("multiplied", "v_proj.weight"),
        without("multiplied", "gate_proj.weight"),
        without("multiplied", "up_proj.weight"),
        without("multiplied", "down_proj.weight"),
    ],
)
def test_half_a_fold_is_noticed(model, folding, forget):
    assert difference(model, forget(folding)) > 1e-2


def test_pieces_of_rows_fold_as_the_whole_and_unfold_to_the_checkpoint(model, folding):
    weights = CheckpointWeights(model)
    for name in (
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.2.input_layernorm.weight",
        "model.norm.weight",
    ):
        whole = folding.apply(name, weights[name])
        pieces = [
            folding.apply(name, weights[name][start : start + 7], start) for start in range(0, len(whole), 7)
        ]
        assert torch.equal(torch.cat(pieces), whole)
        torch.testing.assert_close(folding.undo(name, whole[5:9], 5).float(), weights[name][5:9].float())


def test_every_linear_input_but_that_of_o_proj_is_folded(model, folding):
    names = {
        name for name, _ in model.named_parameters() if name.endswith("proj.weight") and "o_proj" not in name
    }
    assert set(folding.multiplied) == names
    assert len(folding.divided) == 3 * model.config.num_hidden_layers


def test_a_large_column_becomes_smaller_and_its_weights_larger():
    size, largest = torch.tensor([1.0, 100.0, 1.0]), torch.tensor([1.0, 1.0, 1.0])
    factors = factors_for(size, largest, 0.5)
    torch.testing.assert_close(factors[1] / factors[0], torch.tensor(10.0))
    torch.testing.assert_close(factors.log().mean(), torch.tensor(0.0), atol=1e-6, rtol=0)


def test_an_integer_product_gains_by_folding():
    """If this fails, smoothing costs a calibration and brings nothing."""

    def rounded(values):
        step = values.abs().amax(-1, keepdim=True) / 127
        return (values / step).round() * step

    generator = torch.Generator().manual_seed(0)
    inputs, weight = torch.randn(64, 32, generator=generator), torch.randn(48, 32, generator=generator)
    inputs[:, 5] *= 60
    size = inputs.pow(4).mean(0).pow(0.25)
    factors = factors_for(size, weight.abs().amax(0), 0.65)
    true = inputs @ weight.T
    plain, folded = (
        float((rounded(inputs / f) @ rounded(weight * f).T - true).square().mean())
        for f in (torch.ones(32), factors)
    )
    assert folded < plain / 4


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_a_column_of_nothing_is_left_alone(bad):
    """Zero would divide by zero; what is not finite is for the packing to refuse, by the tensor's name."""
    factors = factors_for(torch.tensor([bad, 4.0, 1.0]), torch.ones(3), 0.5)
    assert factors[0] == 1.0
    assert bool(torch.isfinite(factors).all())
    assert torch.equal(factors_for(torch.tensor([bad]), torch.ones(1), 0.5), torch.ones(1))


def test_one_huge_token_does_not_decide():
    """Qwen2's first token is hundreds of times as large as the others, and has a scale of its own."""
    inputs = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    sizes, with_huge = ColumnSizes(), ColumnSizes()
    sizes.add(inputs)
    with_huge.add(torch.cat([inputs[:1] * 1e4, inputs[1:]]))
    torch.testing.assert_close(sizes.size, with_huge.size)


def test_parts_of_a_text_count_as_the_whole():
    inputs = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    whole, parts = ColumnSizes(), ColumnSizes()
    whole.add(inputs)
    for part in inputs.split([3, 30, 7]):
        parts.add(part)
    torch.testing.assert_close(whole.size, parts.size)
    assert float(ColumnSizes().size) == 0


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.2)])
def test_what_is_seen_is_what_transformers_gives_to_each_product(model, monkeypatch, dtype, tolerance):
    """The pass builds each layer by itself; if it went wrong, factors would fit another model."""
    monkeypatch.setattr(statistics, "product_dtype", lambda: dtype)
    sequences = [TOKENS, TOKENS[::-1]]
    observer = Observer(recipe_for("int8", model.config.hidden_size), model.config.num_hidden_layers)
    observe(model, sequences, observer)
    for found in (
        inputs for layer in range(model.config.num_hidden_layers) for inputs in folded_inputs(layer)
    ):
        expected = ColumnSizes()
        module = model.get_submodule(found.readers[0].removesuffix(".weight"))
        handle = module.register_forward_pre_hook(lambda _, seen, to=expected: to.add(seen[0].flatten(0, 1)))
        Reference(model).hidden_states(sequences)
        handle.remove()
        torch.testing.assert_close(observer.sizes[found].size, expected.size, rtol=tolerance, atol=1e-3)


def test_calibration_leaves_the_model_as_it_was(model, tiny):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folding_on(model, calibration_text(None, tiny, 320, 256, 50).sequences)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
