"""If one of these fails, a tensor that is dequantised or merged on the way is not what its format says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from qconvert.checkpoint.computed import KeptWeights
from qconvert.checkpoint.load import load_model, open_checkpoint
from qconvert.checkpoint.reference import Reference
from qconvert.checkpoint.weights import CheckpointWeights
from qconvert.formats.blocks import assemble
from qconvert.formats.layout import PackedWeight
from qconvert.formats.recipe import BlockFormat, Kept

NAME = "model.layers.1.mlp.down_proj.weight"
TOKENS = list(range(40))


class Eighths:
    """A matrix in eighths: 4-bit codes about 8 whose scale is 1/8."""

    stored_as = "4 bits (eighths)"
    stored_bytes = 0
    kept = Kept(BlockFormat(4, 32, symmetric=True, scale_dtype="float16"))

    def __init__(self, codes: torch.Tensor) -> None:
        self.shape = tuple(codes.shape)
        self._codes = codes
        self.computed, self.released = 0, 0

    def rows(self, wanted):
        self.computed += 1
        return (self._codes[wanted].float() - 8) / 8

    def pack(self) -> PackedWeight:
        rows, columns = self.shape
        return assemble(self._codes, torch.full((rows, columns // 32), 0.125), None, self.kept.fmt)

    def order(self) -> None:
        return None

    def release(self) -> None:
        self.released += 1


def loaded(folder: Path):
    """A tiny model in which one matrix is computed, and that matrix."""
    checkpoint = open_checkpoint(folder)
    rows, columns = checkpoint.tensors[NAME].shape
    tensor = Eighths(torch.randint(0, 16, (rows, columns), dtype=torch.uint8))
    return load_model(replace(checkpoint, computed={NAME: tensor})), tensor


def test_pytorch_computes_with_what_the_tensor_gives(tied: Path) -> None:
    model, tensor = loaded(tied)
    plain = load_model(open_checkpoint(tied))
    plain.get_parameter(NAME).data = tensor.rows(slice(None))
    assert abs(Reference(model).logits(TOKENS) - Reference(plain).logits(TOKENS)).max() < 1e-5
    assert "4 bits (eighths)" in Reference(model).dtype


def test_nothing_computes_with_the_placeholder(tied: Path) -> None:
    """Whoever reads the model's own parameter gets NaN, and no plausible number."""
    model, _ = loaded(tied)
    assert bool(model.get_parameter(NAME).isnan().all())
    assert model.get_parameter(NAME).untyped_storage().nbytes() == 2


def test_a_tensor_is_computed_once_until_it_is_released(tied: Path) -> None:
    model, tensor = loaded(tied)
    weights = CheckpointWeights(model)
    assert weights.shape(NAME) == tensor.shape
    assert tensor.computed == 0
    assert torch.equal(weights[NAME], weights[NAME])
    assert torch.equal(weights.rows(NAME, torch.tensor([3, 1])), weights[NAME][[3, 1]])
    assert tensor.computed == 1
    weights.release(NAME)
    assert tensor.released == 1
    assert torch.equal(weights.rows(NAME, slice(2, 4)), tensor.rows(slice(2, 4)))


def test_kept_weights_are_those_of_the_recipe(tied: Path) -> None:
    model, tensor = loaded(tied)
    kept = KeptWeights(model, {NAME: tensor.kept})
    assert list(kept) == [NAME]
    assert torch.equal(kept[NAME].data, tensor.pack().data)
