"""If these fail, a GGUF file that is damaged, hostile or of another kind is not refused by name."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from qconvert.cli import main
from tests.qconvert.ggufs import make_gguf, write_gguf
from tests.tiny import LLAMA3


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_gguf(tmp_path_factory.mktemp("gguf"))


@pytest.fixture
def path(tiny: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy, to be broken."""
    return Path(shutil.copy(tiny[1], tmp_path / "m.gguf"))


def refused(path: Path, *parts: str) -> None:
    """By inspect and by export alike, with nothing left behind."""
    before = {each.name for each in path.parent.iterdir()}
    for command in (["inspect", str(path)], ["export", str(path), "--output", str(path.parent / "out")]):
        done = CliRunner().invoke(main, command)
        assert isinstance(done.exception, SystemExit), done.exception  # anything else is a traceback
        assert done.exit_code == 1
        said = " ".join(done.output.split())
        assert not [part for part in parts if part not in said], said[-600:]
        assert "/qconvert-gguf-" not in done.output, "a temporary file is named, which the user does not have"
    assert {each.name for each in path.parent.iterdir()} == before


def edited(path: Path, change: Callable[[bytearray], Any]) -> Path:
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))
    return path


def put(place: int, form: str, value: int) -> Callable[[bytearray], None]:
    return lambda content: struct.pack_into(form, content, place, value)


def behind(key: bytes, form: str, value: Any, skip: int = 4) -> Callable[[bytearray], None]:
    """A value behind a name: of an entry the type comes first (4 bytes)."""
    return lambda content: struct.pack_into(form, content, content.index(key) + len(key) + skip, value)


FRAMES: dict[str, tuple[Callable[[bytearray], Any], str]] = {
    "another kind of file": (put(0, "<I", 0), "it is no GGUF file"),
    "an old version": (put(4, "<I", 1), "GGUF version 1 is not supported"),
    "big-endian": (put(4, ">I", 3), "a big-endian file is not supported"),
    "endless tensors": (put(8, "<Q", 1 << 60), "it states 1,152,921,504,606,846,976 tensors"),
    "endless entries": (put(16, "<Q", 1 << 60), "1,152,921,504,606,846,976 entries"),
    "a key of 2^63 bytes": (put(24, "<Q", 1 << 63), "it is truncated"),
    "an empty key": (put(24, "<Q", 0), "has 0 bytes"),
    "an unknown type of entry": (behind(b"qwen2.block_count", "<I", 77, 0), "has the unknown type 77"),
    "endless tokens": (behind(b"tokenizer.ggml.tokens", "<Q", 1 << 61, 8), "it is truncated"),
    "endless numbers": (behind(b"tokenizer.ggml.token_type", "<Q", 1 << 61, 8), "it is truncated"),
    "arrays of arrays": (behind(b"tokenizer.ggml.tokens", "<I", 9, 4), "has the unknown type 9"),
    "a tensor of five dimensions": (behind(b"token_embd.weight", "<I", 5, 0), "has 5 dimensions"),
    "a shape of 2^62": (behind(b"token_embd.weight", "<Q", 1 << 62, 4), "it is truncated"),
    "an empty shape": (behind(b"token_embd.weight", "<Q", 0, 4), "has shape"),
    "an unknown type of tensor": (behind(b"token_embd.weight", "<I", 99, 20), "has the unknown type 99"),
    "whole numbers as weights": (
        behind(b"token_embd.weight", "<I", 26, 20),
        "I32",
    ),
    "a place beyond the end": (behind(b"output_norm.weight", "<Q", 1 << 40, 16), "it is truncated"),
    "a place between two": (behind(b"token_embd.weight", "<Q", 3, 24), "between two places"),
    "two tensors in one place": (behind(b"output_norm.weight", "<Q", 0, 16), "overlaps"),
    "no text": (behind(b"tokenizer.chat_template", "<B", 0xFF, 12), "text in UTF-8 is needed"),
    "NaN": (behind(b"qwen2.attention.layer_norm_rms_epsilon", "<f", float("nan")), "a number is needed"),
    "a text for a number": (behind(b"qwen2.block_count", "<I", 6, 0), "one whole number is needed"),
    "no layers": (behind(b"qwen2.block_count", "<I", 0), "num_hidden_layers = 0"),
    "a million layers": (behind(b"qwen2.block_count", "<I", 1_000_000), "more than 1,000 layers"),
    "another width": (behind(b"qwen2.feed_forward_length", "<I", 96), "the config implies"),
    "no heads": (behind(b"qwen2.attention.head_count", "<I", 0), "num_attention_heads = 0"),
    "an end token that is none": (behind(b"tokenizer.ggml.eos_token_id", "<I", 99_999), "it has 320 tokens"),
}


@pytest.mark.parametrize("name", FRAMES)
def test_a_broken_frame_is_refused(path: Path, name: str) -> None:
    change, message = FRAMES[name]
    refused(edited(path, change), message)


@pytest.mark.parametrize("share", [0.0, 1e-5, 0.001, 0.02, 0.05, 0.5, 0.999])
def test_a_truncated_file_is_refused(path: Path, share: float) -> None:
    refused(
        edited(path, lambda content: content.__delitem__(slice(int(share * len(content)), None))),
        "is unusable",
    )


def test_what_git_lfs_leaves_is_refused(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123456\n")
    refused(path, "a Git LFS pointer in place of a file of 123,456 bytes", "git lfs pull")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    refused(tmp_path / "none.gguf", "none.gguf")


def test_a_folder_of_gguf_files_says_to_give_one(path: Path) -> None:
    done = CliRunner().invoke(main, ["inspect", str(path.parent)])
    assert done.exit_code == 1
    assert f"give the GGUF file that you want itself, such as {path}" in done.output.replace("\n", "")


ENTRIES: dict[str, tuple[dict[str, Any], str]] = {
    "a window": ({"qwen2.attention.sliding_window": ("add_uint32", 64)}, "0 is"),
    "experts": ({"qwen2.expert_count": ("add_uint32", 8)}, "qwen2.expert_count = 8"),
    "something new": ({"qwen2.attention.sinks": ("add_uint32", 1)}, "it is not known what it means"),
    "another scaling": ({"qwen2.rope.scaling.type": ("add_string", "longrope")}, "none, linear and yarn"),
    "an adapter": ({"general.type": ("add_string", "adapter")}, "a whole model is needed"),
    "another architecture": (
        {"general.architecture": ("add_string", "gemma3")},
        "architecture gemma3",
    ),
    "experts by name": ({"general.architecture": ("add_string", "qwen3moe")}, "a mixture of experts"),
    "Qwen3.5": ({"general.architecture": ("add_string", "qwen35")}, "general.architecture qwen35"),
    "SentencePiece": ({"tokenizer.ggml.model": ("add_string", "llama")}, "its tokenizer is SentencePiece"),
    "another rule": ({"tokenizer.ggml.pre": ("add_string", "falcon")}, "by the rule 'falcon'"),
    "a merge of nothing": ({"tokenizer.ggml.merges": ("add_array", ["q zz"])}, "the merge 'q zz'"),
    "equal tokens": ({"tokenizer.ggml.tokens": ("add_array", ["a"] * 320)}, "two of its tokens are the same"),
    "few types": ({"tokenizer.ggml.token_type": ("add_array", [1, 1])}, "a number for each token"),
    "a broken template": ({"tokenizer.chat_template": ("add_string", "{% if %}")}, "syntax is wrong"),
    "a template's bad name": (
        {"tokenizer.chat_template.../x": ("add_string", "a")},
        "the name of a template",
    ),
    "a wide head": ({"qwen2.attention.key_length": ("add_uint32", 32)}, "the config implies"),
    "unlike heads": ({"qwen2.attention.value_length": ("add_uint32", 32)}, "a head has 16 numbers"),
    "a head by layers": (
        {"qwen2.attention.head_count": ("add_array", [4, 2, 4])},
        "one whole number is needed",
    ),
    # A list where a number is due was a traceback.
    "experts by layers": ({"qwen2.expert_count": ("add_array", [0, 0])}, "qwen2.expert_count = "),
    "parts by layers": ({"split.no": ("add_array", [0, 1])}, "split.no = "),
    "a text for parts": ({"split.count": ("add_string", "two")}, "split.count = "),
    "alignment": ({"general.alignment": ("add_uint32", 33)}, "general.alignment = 33"),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_that_is_not_understood_is_refused(
    tiny: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    more, message = ENTRIES[name]
    write_gguf(tiny[0], tmp_path / "m.gguf", more=more)
    refused(tmp_path / "m.gguf", message)


@pytest.mark.parametrize(
    "name", ["token_embd.weight", "blk.1.ffn_up.weight", "output_norm.weight", "blk.0.attn_q.bias"]
)
def test_a_missing_tensor_is_refused(tiny: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    write_gguf(tiny[0], tmp_path / "m.gguf", without=name)
    refused(tmp_path / "m.gguf", "has no embedding" if name == "token_embd.weight" else "is missing")


def test_factors_that_are_not_llama_3_s_are_refused(tmp_path: Path) -> None:
    _, path = make_gguf(tmp_path, "llama", rope_parameters=LLAMA3)  # stretched from 32 tokens on, not 8,192
    refused(path, "its factors are not those of Llama 3")
