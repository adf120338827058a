"""The reference is transformers' own model in float32, whatever the checkpoint's dtype."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qconvert.checkpoint.load import load_model, open_checkpoint
from qconvert.checkpoint.reference import CheckpointSource, Reference
from tests.tiny import make_tiny_checkpoint

TOKENS = [(7 * index + 3) % 320 for index in range(90)]


def load(folder: Path) -> torch.nn.Module:
    return load_model(open_checkpoint(folder))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_equal_to_the_model_in_float32(tmp_path: Path, dtype: str, tied: bool) -> None:
    model = load(make_tiny_checkpoint(tmp_path / "model", dtype=dtype, tie_word_embeddings=tied))
    logits = Reference(model).logits(TOKENS)
    with torch.no_grad():
        due = model.float()(torch.tensor([TOKENS])).logits[0]
    assert torch.equal(torch.from_numpy(logits), due)


@pytest.mark.parametrize("kind", ["sliding", "yarn"])
def test_equal_with_windows_and_scaled_angles(tmp_path: Path, kind: str) -> None:
    # Masks and angles are computed in the dtype of the hidden states: bfloat16 angles would be far off.
    model = load(make_tiny_checkpoint(tmp_path / "model", dtype="bfloat16", **{kind: True}))
    logits = Reference(model).logits(TOKENS)
    with torch.no_grad():
        due = model.float()(torch.tensor([TOKENS])).logits[0]
    assert torch.equal(torch.from_numpy(logits), due)


def test_bfloat16_itself_is_far_from_it(tmp_path: Path) -> None:
    # Otherwise the tests above could not tell a reference that forgets to upcast.
    model = load(make_tiny_checkpoint(tmp_path / "model", dtype="bfloat16"))
    with torch.no_grad():
        rounded = model(torch.tensor([TOKENS])).logits[0].float()
    assert (torch.from_numpy(Reference(model).logits(TOKENS)) - rounded).abs().max() > 0.01


def test_a_batch_of_several_lengths_gives_what_each_gives_alone(tmp_path: Path) -> None:
    reference = Reference(load(make_tiny_checkpoint(tmp_path / "model", dtype="bfloat16", sliding=True)))
    sequences = [TOKENS[:40], TOKENS, TOKENS[10:11]]
    for together, tokens in zip(reference.hidden_states(sequences), sequences):
        (alone,) = reference.hidden_states([tokens])
        assert together.shape == (len(tokens), 64)
        assert torch.allclose(together, alone, atol=2e-5)


def test_one_module_at_a_time_is_in_float32(tmp_path: Path) -> None:
    model = load(make_tiny_checkpoint(tmp_path / "model", dtype="bfloat16", tie_word_embeddings=False))
    upcast: list[set[str]] = []

    class Watching(CheckpointSource):
        def rows(self, name: str, rows: slice | torch.Tensor) -> torch.Tensor:
            upcast.append(
                {found for found, tensor in model.named_parameters() if tensor.dtype == torch.float32}
            )
            return super().rows(name, rows)

    before = {name: tensor.data_ptr() for name, tensor in model.named_parameters()}
    reference = Reference(model, Watching(model))
    reference.logits(TOKENS)
    assert upcast
    # The weight of a module is in float32 while its bias is fetched, and no other module's.
    assert all(len({name.rsplit(".", 1)[0] for name in found}) <= 1 for found in upcast)
    assert {name: tensor.data_ptr() for name, tensor in model.named_parameters()} == before
    assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16}


def test_the_head_is_multiplied_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(make_tiny_checkpoint(tmp_path / "model", dtype="bfloat16"))
    reference = Reference(model)
    due = reference.logits(TOKENS)
    asked: list[slice] = []

    class Watching(CheckpointSource):
        def rows(self, name: str, rows: slice | torch.Tensor) -> torch.Tensor:
            if name == "model.embed_tokens.weight" and isinstance(rows, slice):
                asked.append(rows)
            return super().rows(name, rows)

    monkeypatch.setattr("qconvert.checkpoint.reference._HEAD_PIECE", 64 * 50)
    logits = Reference(model, Watching(model)).logits(TOKENS)
    assert [piece.start for piece in asked] == [0, 50, 100, 150, 200, 250, 300]
    assert abs(logits - due).max() < 1e-5


def test_weights_are_given_back_after_an_error(tmp_path: Path) -> None:
    model = load(make_tiny_checkpoint(tmp_path / "model", dtype="bfloat16"))
    handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    reference = Reference(model)
    with pytest.raises(ZeroDivisionError):
        reference.logits(TOKENS)
    handle.remove()
    assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_it_says_in_what_it_computes(tmp_path: Path) -> None:
    for dtype, statement in (
        ("float32", "float32"),
        ("bfloat16", "float32 (weights bfloat16, upcast layer by layer)"),
    ):
        assert Reference(load(make_tiny_checkpoint(tmp_path / dtype, dtype=dtype))).dtype == statement
