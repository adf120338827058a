"""If these fail, a folded model is another model, or the proof does not see that it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qconvert.calibration.smoothing import column_sizes, factors_for, smooth
from qconvert.calibration.text import calibration_ids
from qconvert.checkpoint.load import load_model, open_checkpoint
from qconvert.checkpoint.reference import Reference
from qconvert.checkpoint.weights import CheckpointWeights
from qconvert.formats.folding import FoldedWeights, Folding, folded_inputs
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
    return smooth(model, calibration_ids(tiny, 320, limit=600), 0.65)


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


def test_one_huge_token_does_not_decide(model):
    """Qwen2's first token is hundreds of times as large as the others, and has a scale of its own."""
    module = model.get_submodule("model.layers.0.mlp.down_proj")
    found = folded_inputs(0)[2]
    sizes = column_sizes(model, [TOKENS])[found]
    handle = module.register_forward_pre_hook(
        lambda _, arguments: (torch.cat([arguments[0][:, :1] * 1e4, arguments[0][:, 1:]], 1),)
    )
    with_huge = column_sizes(model, [TOKENS])[found]
    handle.remove()
    torch.testing.assert_close(sizes, with_huge)


def test_padding_counts_for_nothing(model):
    """Sequences of unlike lengths run together; each gives what it gives alone."""
    sequences = [[7, 8, 9] * 40, [20, 21, 22, 23], [5] * 30]
    together, totals = column_sizes(model, sequences), {}
    for sequence in sequences:
        for found, size in column_sizes(model, [sequence]).items():
            totals[found] = totals.get(found, 0) + size**4 * len(sequence)
    count = sum(map(len, sequences))
    for found, size in together.items():
        torch.testing.assert_close(size, (totals[found] / count) ** 0.25, rtol=1e-4, atol=1e-6)


def test_calibration_leaves_the_model_as_it_was(model, tiny):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    smooth(model, calibration_ids(tiny, 320, limit=50), 0.65)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
