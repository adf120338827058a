"""If one of these fails, somebody with a checkpoint as training leaves it is not told how to go on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qconvert.checkpoint.load import load_model, open_checkpoint
from qconvert.inspection.inspection import describe
from tests.qconvert.breaking import edit_json, edit_weights, refusal
from tests.qconvert.building import run
from tests.tiny import make_tiny_checkpoint


def renamed(folder: Path, rename: Callable[[str], str]) -> None:
    path = folder / "model.safetensors"
    tensors = {rename(name): tensor.clone() for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def told(folder: Path, message: str, remedy: str) -> None:
    """By export and by inspect alike, once and not for every tensor."""
    error = refusal(folder)
    assert message in error.what
    assert remedy in (error.hint or "")
    inspected = describe(folder)
    assert len(inspected.problems) == 1
    assert message in inspected.problems[0]
    assert remedy in inspected.hints[0]
    assert remedy in " ".join(run("inspect", folder).output.split())


@pytest.mark.parametrize(
    ("piece", "who", "remedy"),
    [
        ("_orig_mod.", "torch.compile", "save model._orig_mod with save_pretrained"),
        ("module.", "DistributedDataParallel", "save model.module with save_pretrained"),
        ("base_model.model.", "peft", "save model.merge_and_unload() with save_pretrained"),
        ("base_model.", "peft", "save model.merge_and_unload() with save_pretrained"),
        ("module._orig_mod.", "DistributedDataParallel", "save model.module with save_pretrained"),
        ("_fsdp_wrapped_module.", "FullyShardedDataParallel", "full state dict"),
    ],
)
def test_names_that_a_wrapper_has_changed(tied: Path, piece: str, who: str, remedy: str) -> None:
    renamed(tied, lambda name: piece + name)
    told(tied, f"which {who} puts there", remedy)


def test_a_wrapper_in_the_middle_of_the_names(tied: Path) -> None:
    renamed(tied, lambda name: name.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn."))
    told(tied, 'names of tensors have "_checkpoint_wrapped_module." in them', "save the model before")


def test_renaming_as_the_message_says_mends_the_checkpoint(tied: Path) -> None:
    renamed(tied, lambda name: f"_orig_mod.{name}")
    hint = refusal(tied).hint or ""
    code = hint[hint.index("t = safetensors") :].replace("FILE", repr(str(tied / "model.safetensors")))
    exec(f"import safetensors.torch; {code}")
    load_model(open_checkpoint(tied))


def test_a_decoder_that_was_saved_without_its_head(tied: Path) -> None:
    renamed(tied, lambda name: name.removeprefix("model."))
    told(tied, 'names of tensors lack "model." in front', "AutoModelForCausalLM in place of AutoModel")


def test_a_decoder_inside_of_a_larger_model(tied: Path) -> None:
    renamed(tied, lambda name: f"language_model.{name}")
    told(tied, 'names of tensors begin with "language_model."', "k.replace('language_model.', '')")


def test_an_adapter_in_the_place_of_weights(tied: Path) -> None:
    names = ("lora_A", "lora_B")
    tensors = {
        f"base_model.model.model.layers.0.self_attn.q_proj.{name}.weight": torch.ones(2, 2) for name in names
    }
    save_file(tensors, tied / "model.safetensors", metadata={"format": "pt"})
    told(tied, "the weight files hold an adapter (LoRA) and not a model", "merge_and_unload()")


def test_an_adapter_beside_a_config(tied: Path) -> None:
    (tied / "model.safetensors").rename(tied / "adapter_model.safetensors")
    told(tied, "adapter_model.safetensors is refused: an adapter (LoRA)", "merge_and_unload()")


def test_a_folder_that_holds_an_adapter_alone(tmp_path: Path) -> None:
    # "There is no config.json": true, and no help.
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen2.5-0.5B"}')
    (folder / "adapter_model.safetensors").write_bytes(b"")
    error = refusal(folder)
    assert "This folder holds an adapter (LoRA) of Qwen/Qwen2.5-0.5B and not a model" in error.what
    assert "qconvert export MODEL --adapter FOLDER" in (error.hint or "")


def test_a_missing_head(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "c", tie_word_embeddings=False)
    edit_weights(folder, lambda tensors: tensors.pop("lm_head.weight"))
    told(folder, "lm_head.weight is missing", "set tie_word_embeddings to true in config.json")
    edit_json(folder / "config.json", lambda config: config.update(tie_word_embeddings=True))
    load_model(open_checkpoint(folder))


def test_tokens_that_were_added_in_training(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "c")
    edit_json(folder / "config.json", lambda config: config.update(vocab_size=310))
    told(folder, "model.embed_tokens.weight has shape [320, 64]", "set vocab_size to 320 in config.json")
    edit_json(folder / "config.json", lambda config: config.update(vocab_size=320))
    load_model(open_checkpoint(folder))


def test_a_quantization_config_that_was_left_in_a_dequantised_model(tied: Path) -> None:
    settings = {"quantization_config": {"quant_method": "bitsandbytes"}}
    edit_json(tied / "config.json", lambda config: config.update(settings))
    error = refusal(tied)
    assert "quantised already, with method bitsandbytes" in error.what
    assert "hold plain floats: if this model was dequantised, delete quantization_config" in (
        error.hint or ""
    )


def test_a_quantization_config_of_quantised_weights(tied: Path) -> None:
    settings = {"quantization_config": {"quant_method": "gptq"}}
    edit_json(tied / "config.json", lambda config: config.update(settings))
    renamed(tied, lambda name: name.replace("q_proj.weight", "q_proj.qweight"))
    error = refusal(tied)
    assert "give the original checkpoint" in (error.hint or "")
    assert "delete quantization_config" not in (error.hint or "")


def test_quantised_weights_without_a_quantization_config(tied: Path) -> None:
    renamed(tied, lambda name: name.replace("q_proj.weight", "q_proj.qweight"))
    assert "the weights seem to be quantised already" in (refusal(tied).hint or "")


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "pytorch_model.safetensors"])
def test_weights_under_another_name(tied: Path, name: str) -> None:
    # "no safetensors weights in the folder", with the weights in it.
    (tied / "model.safetensors").rename(tied / name)
    told(tied, f"model.safetensors is missing: the folder has {name}", f"ln -s {name}")
    (tied / "model.safetensors").symlink_to(name)
    load_model(open_checkpoint(tied))


def test_a_sharded_variant(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    other = index.rename(sharded / "model.safetensors.index.fp16.json")
    told(sharded, f"the folder has {other.name}", f"ln -s {other.name}")
    index.symlink_to(other.name)
    load_model(open_checkpoint(sharded))


def test_a_shard_that_was_left_behind(sharded: Path) -> None:
    shard = next(sharded.glob("model-*-of-*.safetensors"))
    left = sharded / "model-00001-of-00099.safetensors"
    left.write_bytes(shard.read_bytes())
    told(sharded, f"shard {left.name} is missing from the index", "move it out of the folder")
    left.unlink()
    load_model(open_checkpoint(sharded))


def test_files_that_are_not_read_beside_the_one_that_is(tied: Path) -> None:
    names = ("model-00001-of-00002.safetensors", "model.fp16.safetensors")
    for name in names:
        (tied / name).write_bytes(b"")
    told_beside = f"model.safetensors is read, and {', '.join(names)} beside it not"
    assert open_checkpoint(tied).notes == (told_beside,)


@pytest.mark.parametrize(("key", "value"), [("max_length", 20), ("num_beams", 4)])
def test_a_default_that_qrun_does_not_have_is_told_by_the_export(tied: Path, key: str, value: object) -> None:
    edit_json(tied / "generation_config.json", lambda config: config.update({key: value}))
    (note,) = open_checkpoint(tied).notes
    assert note.startswith(f"generation_config.json asks for {key}={value!r}, which qrun does not do")
    assert ("max_new_tokens is obeyed" in note) == (key == "max_length")


def test_no_end_token_anywhere_is_left_out(tied: Path, tmp_path: Path) -> None:
    # genai_config named token 0, which is "!" in Qwen2: answers ended at exclamation marks.
    edit_json(
        tied / "config.json",
        lambda config: config.update(eos_token_id=None, bos_token_id=None, pad_token_id=None),
    )
    (tied / "generation_config.json").unlink()
    edit_json(tied / "tokenizer_config.json", lambda settings: settings.pop("eos_token"))
    result = run("export", tied, "--output", tmp_path / "m", "--no-verify")
    assert result.exit_code == 0, result.output
    model = json.loads((tmp_path / "m" / "genai_config.json").read_text())["model"]
    assert not [key for key in model if key.endswith("token_id")]
    assert json.loads((tmp_path / "m" / "qconvert.json").read_text())["tokens"] == {"eos": []}
