"""Columns of one size: if these fail, GPTQ depends on how a checkpoint's channels are scaled by chance."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.off_grid import off_grid
from qconvert.calibration.equalise import equal_columns
from qconvert.checkpoint.load import load_model, open_checkpoint
from qconvert.checkpoint.weights import CheckpointWeights
from qconvert.formats.folding import FoldedWeights, Folding, decoder_inputs
from qconvert.formats.layout import NonFiniteWeightError
from qconvert.formats.record import read_record
from qconvert.models.families import spec_of
from tests.qconvert.building import run
from tests.tiny import make_tiny_checkpoint


def folded(checkpoint: Path) -> tuple[FoldedWeights, object]:
    model = load_model(open_checkpoint(checkpoint))
    weights, spec = CheckpointWeights(model), spec_of(model.config)
    return FoldedWeights(weights, Folding.of_inputs(equal_columns(weights, spec))), spec


def test_every_column_has_the_size_of_its_neighbours(tied: Path) -> None:
    weights, spec = folded(tied)
    for layer in range(spec.num_hidden_layers):
        for found in decoder_inputs(layer, spec.num_attention_heads, spec.num_key_value_heads):
            sizes = torch.stack([weights[name].square().sum(0) for name in found.readers]).log().mean(0)
            if found.queries > 1:  # heads that read one value head have its factors in common
                shared = torch.stack([weights[name].square().sum(0) for name in found.readers])[0]
                sizes = shared.view(found.heads, found.queries, -1).mean(1).flatten().log()
            assert float(sizes.max() - sizes.min()) < 0.02, found.divided  # factors have 8 bits


def test_a_checkpoint_that_was_scaled_by_chance_becomes_the_same(tied: Path, tmp_path: Path) -> None:
    """Up to the common size of an input's columns, which factors leave as they find it."""
    off_grid(tied, tmp_path / "off")
    ours, spec = folded(tied)
    theirs, _ = folded(tmp_path / "off")
    for layer in range(spec.num_hidden_layers):
        for found in decoder_inputs(layer, spec.num_attention_heads, spec.num_key_value_heads):
            for name in found.readers:
                one, other = ours[name], theirs[name]
                ratio = (one * other).sum() / other.square().sum()
                assert (one - ratio * other).norm() < 0.01 * one.norm(), name


def test_columns_of_zeros_are_left_alone(tied: Path) -> None:
    model = load_model(open_checkpoint(tied))
    name = "model.layers.1.mlp.down_proj.weight"
    model.get_parameter(name).data = model.get_parameter(name).detach().clone()
    model.get_parameter(name).data[:, 3] = 0
    factors = {
        found.divided: each
        for found, each in equal_columns(CheckpointWeights(model), spec_of(model.config)).items()
    }
    found = factors["model.layers.1.mlp.up_proj.weight"]
    assert found[3] == 1
    assert bool(torch.isfinite(found).all())
    assert 0.1 < float(found.min()) < float(found.max()) < 10


def test_weights_that_are_not_finite_are_named(tied: Path) -> None:
    model = load_model(open_checkpoint(tied))
    name = "model.layers.2.self_attn.o_proj.weight"
    model.get_parameter(name).data = model.get_parameter(name).detach().clone()
    model.get_parameter(name).data[1, 3] = float("inf")
    with pytest.raises(NonFiniteWeightError, match=name):
        equal_columns(CheckpointWeights(model), spec_of(model.config))


@pytest.mark.parametrize("recipe", ["gptq", "gptq-mixed"])
def test_an_export_that_was_interrupted_goes_on_with_the_same_factors(
    tmp_path: Path, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are not kept with the layers that were finished: they have to come out the same again."""
    from qconvert.calibration.gptq import walk

    checkpoint = make_tiny_checkpoint(tmp_path / "model")
    options = ("export", checkpoint, "--precision", "int4", "--recipe", recipe, "--quiet")
    assert run(*options, "-o", tmp_path / "whole").exit_code == 0
    true = walk.Walk.layer

    def stops(self: object, index: int, known: object = None) -> object:
        if index == 2:
            raise KeyboardInterrupt
        return true(self, index, known)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(walk.Walk, "layer", stops)
        assert run(*options, "-o", tmp_path / "again").exit_code != 0
    assert not (tmp_path / "again").exists()
    assert run(*options, "-o", tmp_path / "again").exit_code == 0
    assert read_record(tmp_path / "again") == read_record(tmp_path / "whole")
