"""If one of these fails, a good checkpoint is refused or loaded with other weights than its files hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qconvert.checkpoint.hashing import hash_files
from qconvert.checkpoint.load import checkpoint_name, inspect_files, load_model, open_checkpoint
from qconvert.models.families import spec_of
from qconvert.models.recorder import expected_tensors
from tests.qconvert.breaking import edit_json, edit_weights
from tests.tiny import make_tiny_checkpoint


def test_a_tied_checkpoint_opens_with_headers_only(tied: Path) -> None:
    checkpoint = open_checkpoint(tied)
    assert checkpoint.name == "tied"
    assert checkpoint.weight_files == (tied / "model.safetensors",)
    assert set(checkpoint.tensors) == set(expected_tensors(spec_of(checkpoint.config)))
    assert checkpoint.tensors["model.layers.1.self_attn.k_proj.weight"].shape == (32, 64)
    assert checkpoint.generation_config is not None
    assert checkpoint.generation_config["eos_token_id"] == [258, 256]


def test_a_sharded_checkpoint_names_the_file_of_each_tensor(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    assert len(checkpoint.weight_files) > 1
    for name, info in checkpoint.tensors.items():
        assert name in load_file(sharded / info.file)


@pytest.mark.parametrize(
    "options", [{}, {"sharded": True, "tie_word_embeddings": False, "dtype": "bfloat16"}]
)
def test_the_loaded_model_has_the_files_weights_and_dtype(tmp_path: Path, options: dict[str, Any]) -> None:
    checkpoint = open_checkpoint(make_tiny_checkpoint(tmp_path / "model", **options))
    model = load_model(checkpoint)
    assert not model.training
    state = model.state_dict()
    for path in checkpoint.weight_files:
        for name, tensor in load_file(path).items():
            assert state[name].dtype == tensor.dtype == getattr(torch, options.get("dtype", "float32"))
            assert torch.equal(state[name], tensor), name


def test_loading_is_silent_and_leaves_transformers_settings_alone(
    tied: Path, capfd: pytest.CaptureFixture
) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_model(open_checkpoint(tied))
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_rotary_buffers_and_a_tied_head_are_harmless(tied: Path) -> None:
    # Old checkpoints store inverse frequencies; some tied ones store the head a second time.
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit_weights(tied, add)
    load_model(open_checkpoint(tied))


def test_old_spellings_of_the_config_are_understood(tied: Path) -> None:
    def old(config: dict[str, Any]) -> None:
        del config["rope_parameters"], config["dtype"], config["layer_types"]
        config |= {"torch_dtype": "float32", "rope_theta": 5000.0}
        config["rope_scaling"] = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}

    edit_json(tied / "config.json", old)
    rope = open_checkpoint(tied).config.rope_parameters
    assert (rope["rope_type"], rope["rope_theta"], rope["factor"]) == ("yarn", 5000.0, 2.0)


def test_remote_code_is_never_executed(tied: Path, tmp_path: Path) -> None:
    witness = tmp_path / "executed"
    (tied / "evil.py").write_text(f"open({str(witness)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    auto = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    edit_json(tied / "config.json", lambda config: config.update(auto_map=auto))
    load_model(open_checkpoint(tied))
    assert not witness.exists()


@pytest.mark.parametrize("store", ["models--org--Tiny/blobs", "blobs/4d"])
def test_the_hub_caches_links_are_followed(tied: Path, tmp_path: Path, store: str) -> None:
    # The second store is huggingface_hub 2's, shared by all repositories of a cache.
    snapshot = tmp_path / "hub/models--org--Tiny/snapshots/abc"
    blobs = tmp_path / "hub" / store
    snapshot.mkdir(parents=True)
    blobs.mkdir(parents=True)
    for path in tied.iterdir():
        path.rename(blobs / f"hash-{path.name}")
        (snapshot / path.name).symlink_to(blobs / f"hash-{path.name}")
    checkpoint = open_checkpoint(snapshot)
    assert checkpoint.name == checkpoint_name(snapshot) == "Tiny"
    load_model(checkpoint)


def test_a_missing_tokenizer_does_not_stop_an_export_but_is_told(tied: Path) -> None:
    (tied / "tokenizer.json").unlink()
    open_checkpoint(tied)
    states = {state.name: state for state in inspect_files(tied)}
    assert states["tokenizer.json"].status == "missing"
    assert states["tokenizer.json"].harmful


def test_hash_files_reads_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc" * 3_000_000)
    digests = hash_files([path])
    # sha256sum of the same bytes, computed by coreutils
    assert digests == {"file": "a889aaea4dd43c3ef1b6f125177026b6445c8374d9cd585dd0c52bb020bb8cc5"}
