"""If one of these fails, broken weight files become a wrong model, or are told unclearly."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from qconvert.checkpoint.load import load_model, open_checkpoint
from qconvert.errors import QconvertError
from qconvert.inspection.inspection import describe
from tests.qconvert.breaking import POINTER, edit_json, edit_weights, refusal


def test_git_lfs_pointer(tied: Path) -> None:
    (tied / "model.safetensors").write_text(POINTER)
    message = str(refusal(tied))
    assert "git lfs install && git lfs pull" in message
    assert "3,087,467,144 bytes" in message


def test_git_lfs_pointer_in_place_of_the_tokenizer(tied: Path) -> None:
    (tied / "tokenizer.json").write_text(POINTER)
    assert "git lfs pull" in str(refusal(tied))


@pytest.mark.parametrize("kept", [0, 5, 100, 5000, -1])
def test_truncated_weights(tied: Path, kept: int) -> None:
    path = tied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert "model.safetensors is truncated" in str(refusal(tied))


def safetensors_bytes(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def entry(**changes: Any) -> bytes:
    value = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}
    return json.dumps({"model.norm.weight": value}).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"\0" * 4096,
        b"PK\x03\x04" + b"x" * 4096,
        safetensors_bytes(b"not json"),
        safetensors_bytes(b"[1]"),
        safetensors_bytes(b"\xff\xfe"),
        safetensors_bytes(b"[" * 100_000),
        safetensors_bytes(entry(dtype="F99"), b"x" * 8),
        safetensors_bytes(entry(shape=[3]), b"x" * 8),
        safetensors_bytes(entry(shape=[-2]), b"x" * 8),
        safetensors_bytes(entry(shape=None), b"x" * 8),
        safetensors_bytes(entry(data_offsets=[8, 16]), b"x" * 16),
        safetensors_bytes(entry(data_offsets=[0]), b"x" * 8),
        safetensors_bytes(entry(), b"x" * 9),
    ],
)
def test_garbage_weights(tied: Path, content: bytes) -> None:
    (tied / "model.safetensors").write_bytes(content)
    assert "model.safetensors is unusable" in str(refusal(tied))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_only_pickle_weights(tied: Path, name: str) -> None:
    (tied / "model.safetensors").rename(tied / name)
    message = str(refusal(tied))
    assert f"{name} is refused: only pickle weights" in message
    assert "save_pretrained" in message


def test_no_weights_at_all(tied: Path) -> None:
    (tied / "model.safetensors").unlink()
    assert "model.safetensors is missing" in str(refusal(tied))


def test_shards_without_an_index(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    assert "model.safetensors.index.json is missing" in str(refusal(sharded))


def test_a_shard_missing_on_disk(sharded: Path) -> None:
    first = sorted(sharded.glob("model-*.safetensors"))[0]
    first.unlink()
    assert f"{first.name} is missing" in str(refusal(sharded))


def test_a_shard_missing_from_the_index(sharded: Path) -> None:
    first = sorted(sharded.glob("model-*.safetensors"))[0].name

    def drop(index: dict[str, Any]) -> None:
        index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != first}

    edit_json(sharded / "model.safetensors.index.json", drop)
    assert f"shard {first} is missing from the index" in str(refusal(sharded))


@pytest.mark.parametrize("change", ["moved", "unlisted"])
def test_an_index_that_contradicts_its_shards(sharded: Path, change: str) -> None:
    def contradict(index: dict[str, Any]) -> None:
        places = index["weight_map"]
        others = [file for file in places.values() if file != places["model.norm.weight"]]
        if change == "moved":
            places["model.norm.weight"] = others[0]
        else:
            del places["model.norm.weight"]

    edit_json(sharded / "model.safetensors.index.json", contradict)
    message = str(refusal(sharded))
    assert "model.safetensors.index.json is unusable" in message
    assert "model.norm.weight" in message


@pytest.mark.parametrize("weight_map", [None, [], {"model.norm.weight": 3}])
def test_an_index_without_a_weight_map(sharded: Path, weight_map: object) -> None:
    edit_json(sharded / "model.safetensors.index.json", lambda index: index.update(weight_map=weight_map))
    assert "no weight_map" in str(refusal(sharded))


@pytest.mark.parametrize("style", ["parent", "absolute", "other kind"])
def test_an_index_that_points_outside(sharded: Path, tmp_path: Path, style: str) -> None:
    first = sorted(sharded.glob("model-*.safetensors"))[0].name
    outside = tmp_path / "elsewhere.safetensors"
    shutil.copyfile(sharded / first, outside)
    target = {"parent": "../elsewhere.safetensors", "absolute": str(outside), "other kind": "tokenizer.json"}[
        style
    ]

    def redirect(index: dict[str, Any]) -> None:
        places = index["weight_map"]
        index["weight_map"] = {name: target if file == first else file for name, file in places.items()}

    edit_json(sharded / "model.safetensors.index.json", redirect)
    assert f"{target} is refused: the index points outside the folder" in str(refusal(sharded))


def test_a_link_to_another_disk_is_the_user_s_choice_and_one_that_leads_nowhere_is_named(
    tied: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere.safetensors"
    (tied / "model.safetensors").rename(elsewhere)
    (tied / "model.safetensors").symlink_to(elsewhere)
    open_checkpoint(tied)
    assert describe(tied).files[-1].detail.endswith(f"tensors, a link to {elsewhere}")
    elsewhere.unlink()
    assert f"missing: a link to {elsewhere}, and nothing is there" in str(refusal(tied))


@pytest.mark.parametrize("name", ["m" * 300 + ".safetensors", "a\0b.safetensors", "\ud800.safetensors"])
def test_an_index_with_a_name_that_no_file_can_have(sharded: Path, name: str) -> None:
    def rename(index: dict[str, Any]) -> None:
        index["weight_map"]["model.norm.weight"] = name

    edit_json(sharded / "model.safetensors.index.json", rename)
    assert "is refused: the index has a name here that no file can have" in str(refusal(sharded))


def test_a_shard_that_is_a_link_to_itself(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*-of-*.safetensors"))[0]
    shard.unlink()
    shard.symlink_to(shard.name)
    assert f"{shard.name} is missing" in str(refusal(sharded))
    assert not describe(sharded).whole


def test_shards_and_index_may_be_links_to_another_disk(sharded: Path, tmp_path: Path) -> None:
    # Only names inside of the index may not lead out of the folder; a link is the user's own choice.
    (tmp_path / "disk").mkdir()
    for path in sorted(sharded.glob("model*")):
        path.rename(tmp_path / "disk" / path.name)
        path.symlink_to(tmp_path / "disk" / path.name)
    load_model(open_checkpoint(sharded))
    assert describe(sharded).whole


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj.bias", "model.embed_tokens.weight"])
def test_missing_tensor(tied: Path, name: str) -> None:
    edit_weights(tied, lambda tensors: tensors.pop(name))
    assert f"{name} is missing" in str(refusal(tied))


def test_an_untied_head_must_be_there(tied: Path) -> None:
    # transformers would start with a random head, and only warn
    edit_json(tied / "config.json", lambda config: config.update(tie_word_embeddings=False))
    assert "lm_head.weight is missing (tie_word_embeddings is false)" in str(refusal(tied))


def test_misshapen_tensor(tied: Path) -> None:
    edit_weights(tied, lambda tensors: tensors.update({"model.norm.weight": torch.ones(65)}))
    assert "model.norm.weight has shape [65], the config implies [64]" in str(refusal(tied))


def test_transposed_tensor(tied: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    edit_weights(tied, lambda tensors: tensors.update({name: tensors[name].T.contiguous()}))
    assert f"{name} has shape [128, 64], the config implies [64, 128]" in str(refusal(tied))


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_norm.weight", "base_model.model.q_proj.lora_A.weight"]
)
def test_leftover_tensor(tied: Path, name: str) -> None:
    edit_weights(tied, lambda tensors: tensors.update({name: torch.ones(16)}))
    assert f"{name} has no place in Qwen2ForCausalLM" in str(refusal(tied))


def test_integer_weights(tied: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    edit_weights(tied, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    assert f"{name} is stored as I8" in str(refusal(tied))


def test_a_head_that_differs_although_tied(tied: Path) -> None:
    # transformers leaves such a head untied, with a warning; an export that trusts the config would be wrong
    edit_weights(tied, lambda tensors: tensors.update({"lm_head.weight": torch.ones(320, 64)}))
    with pytest.raises(QconvertError, match=r"lm_head\.weight differs from the embedding"):
        load_model(open_checkpoint(tied))


def test_weights_swapped_after_the_check_are_noticed(tied: Path) -> None:
    checkpoint = open_checkpoint(tied)
    edit_weights(tied, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(QconvertError, match=r"missing keys: model\.norm\.weight"):
        load_model(checkpoint)
