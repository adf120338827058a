"""If one of these fails, a broken or unsupported checkpoint becomes a wrong model, or is told unclearly."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qconvert.checkpoint import checkpoint_name, hash_files, inspect_files, load_model, open_checkpoint
from qconvert.errors import QconvertError
from qconvert.modelconfig import expected_tensors
from tests.tiny import make_tiny_checkpoint

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 3087467144\n"


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("templates")
    return {
        "tied": make_tiny_checkpoint(root / "tied"),
        "sharded": make_tiny_checkpoint(root / "sharded", sharded=True, tie_word_embeddings=False),
    }


@pytest.fixture
def tied(templates: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(templates["tied"], tmp_path / "tied"))


@pytest.fixture
def sharded(templates: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(templates["sharded"], tmp_path / "sharded"))


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def refusal(folder: Path) -> QconvertError:
    """The error of opening the folder, which must leave the folder as it was."""
    before = sorted((path.name, path.lstat().st_size) for path in folder.parent.rglob("*"))
    with pytest.raises(QconvertError) as caught:
        open_checkpoint(folder)
    assert sorted((path.name, path.lstat().st_size) for path in folder.parent.rglob("*")) == before
    return caught.value


# What is accepted


def test_a_tied_checkpoint_opens_with_headers_only(tied: Path) -> None:
    checkpoint = open_checkpoint(tied)
    assert checkpoint.name == "tied"
    assert checkpoint.weight_files == (tied / "model.safetensors",)
    assert set(checkpoint.tensors) == set(expected_tensors(checkpoint.config))
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
    read: list[int] = []
    digests = hash_files([path], progress=read.append)
    # sha256sum of the same bytes, computed by coreutils
    assert digests == {"file": "a889aaea4dd43c3ef1b6f125177026b6445c8374d9cd585dd0c52bb020bb8cc5"}
    assert sum(read) == 9_000_000


# Folder and config.json


def test_missing_folder(tmp_path: Path) -> None:
    assert "There is no folder" in str(refusal(tmp_path / "absent"))


def test_a_file_instead_of_a_folder(tied: Path) -> None:
    assert "is a file" in str(refusal(tied / "model.safetensors"))


def test_no_config(tied: Path) -> None:
    (tied / "config.json").unlink()
    assert "There is no config.json" in str(refusal(tied))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model_type": "qwen2",\n oops}', "malformed JSON in line 2"),
        ("[]", "holds a JSON list"),
        ("", "empty"),
        ("\xff\xfe", "malformed JSON"),
        ("[" * 100_000, "malformed JSON"),
        (POINTER, "git lfs pull"),
    ],
)
def test_malformed_config(tied: Path, text: str, message: str) -> None:
    (tied / "config.json").write_text(text, encoding="latin-1")
    error = refusal(tied)
    assert message in str(error)
    assert error.where == str(tied / "config.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
            "LlamaForCausalLM, model_type llama",
        ),
        ({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}, "Qwen3ForCausalLM"),
        ({"architectures": ["Qwen2ForSequenceClassification"]}, "Qwen2ForSequenceClassification"),
        ({"model_type": None}, "model_type None"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "method gptq"),
        ({"quantization_config": {"quant_method": "awq"}}, "method awq"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "rope_type = 'spiral'"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type = 'dynamic'",
        ),
        ({"rope_scaling": {"type": "mrope"}, "rope_parameters": None}, "rope_type = 'mrope'"),
        (
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 8,
                    "long_factor": [1.0] * 8,
                    "original_max_position_embeddings": 64,
                }
            },
            "rope_type = 'longrope'",
        ),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "factor"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": -1}}, "rope_theta = -1"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"is_causal": False}, "is_causal = False"),
        ({"hidden_size": 66}, "hidden_size"),
        ({"num_key_value_heads": 3}, "3 key/value heads"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": "three"}, "num_hidden_layers"),
        ({"head_dim": 15}, "head"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["chunked_attention"] * 3}, "layer_types"),
        ({"layer_types": ["sliding_attention"] * 3}, "sliding_window = None"),
    ],
)
def test_unsupported_config(tied: Path, change: dict[str, Any], message: str) -> None:
    edit_json(tied / "config.json", lambda config: config.update(change))
    error = refusal(tied)
    assert message in str(error)
    assert "config.json" in str(error.where)


def test_another_architecture_is_told_what_is_supported(tied: Path) -> None:
    edit_json(tied / "config.json", lambda config: config.update(model_type="llama"))
    for family in ("Qwen2.5-Coder", "Qwen2.5-Math", "DeepSeek-R1-Distill-Qwen", "QwQ"):
        assert family in str(refusal(tied))


# Weight files


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


def test_a_link_out_of_the_folder(tied: Path, tmp_path: Path) -> None:
    (tied / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (tied / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    assert "is refused: a link to" in str(refusal(tied))


# Tensors


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
