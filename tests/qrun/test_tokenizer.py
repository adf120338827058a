"""If these fail, a prompt reaches the model as other tokens than in transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from qrun.errors import QrunError
from qrun.text.tokenizer import Tokenizer
from tests.assets import qwen_tokenizer_folder
from tests.tiny import write_tiny_tokenizer

TEXTS = [
    "",
    "Hello, world!",
    "  two  spaces\n\n\tand tabs ",
    "法国的首都是巴黎。",
    "🙂 👨‍👩‍👧‍👦 e\u0301 \u00e9 Å",
    "<|im_start|>user\nhi<|im_end|>\n<tool_call>",
    "1234567 3.14 don't DON'T",
    "مرحبا नमस्ते 안녕하세요",
]


@pytest.fixture(scope="module")
def qwen() -> Tokenizer:
    return Tokenizer.from_folder(qwen_tokenizer_folder())


@pytest.fixture(scope="module")
def reference():
    return AutoTokenizer.from_pretrained(qwen_tokenizer_folder())


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_are_those_of_transformers(qwen, reference, text):
    assert qwen.encode(text, add_special_tokens=True) == reference(text).input_ids
    ids = qwen.encode(text)
    assert ids == reference.encode(text, add_special_tokens=False)
    for skip in (False, True):
        assert qwen.decode(ids, skip_special_tokens=skip) == reference.decode(ids, skip_special_tokens=skip)


def test_special_tokens(qwen, reference):
    assert qwen.special_tokens == reference.special_tokens_map
    assert qwen.special_id("eos_token") == qwen.token_id("<|im_end|>") == reference.eos_token_id
    assert qwen.special_id("bos_token") is None
    assert qwen.special_ids == set(reference.all_special_ids)
    assert qwen.vocab_size == len(reference)
    assert qwen.token(10**6) is qwen.token_id("no such token") is None


def change(folder: Path, name: str, **values: object) -> None:
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | values))


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    write_tiny_tokenizer(tmp_path)
    return tmp_path


def test_a_plain_prompt_gets_what_tokenizer_json_puts_around_it(tiny):
    template = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [256], "tokens": ["<|endoftext|>"]}
        },
    }
    change(tiny, "tokenizer.json", post_processor=template)
    ids = Tokenizer.from_folder(tiny).encode("hi", add_special_tokens=True)
    assert ids[0] == 256
    assert ids == AutoTokenizer.from_pretrained(tiny)("hi").input_ids
    assert 256 not in Tokenizer.from_folder(tiny).encode("hi")


def test_truncation_and_padding_of_the_training_run_are_not_applied(tiny):
    """Some tokenizer.json cut at 512 tokens: a long prompt would lose its end in silence."""
    change(
        tiny,
        "tokenizer.json",
        truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        padding={
            "strategy": {"Fixed": 8},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 256,
            "pad_type_id": 0,
            "pad_token": "<|endoftext|>",
        },
    )
    assert len(Tokenizer.from_folder(tiny).encode("abcdefghij")) == 10
    assert len(Tokenizer.from_folder(tiny).encode("ab")) == 2


def test_special_tokens_written_as_objects_or_in_the_older_file(tiny):
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    as_object = {"__type": "AddedToken", "content": "<|im_end|>", "special": True, **flags}
    change(tiny, "tokenizer_config.json", eos_token=as_object, pad_token=None)
    (tiny / "special_tokens_map.json").write_text(json.dumps({"unk_token": "<|endoftext|>"}))
    expected = {"eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    assert AutoTokenizer.from_pretrained(tiny).special_tokens_map == expected
    assert Tokenizer.from_folder(tiny).special_tokens == expected


def test_no_tokenizer_config_is_no_error(tiny):
    (tiny / "tokenizer_config.json").unlink()
    assert Tokenizer.from_folder(tiny).special_tokens == {}


def test_a_missing_tokenizer_json(tmp_path):
    with pytest.raises(QrunError, match=r"no tokenizer\.json") as caught:
        Tokenizer.from_folder(tmp_path)
    assert caught.value.where == str(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"version https://git-lfs.github.com/spec/v1\n", b"\xff\xfe", b"[1"]
)
def test_a_malformed_tokenizer_json(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(QrunError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.from_folder(tmp_path)


def test_a_truncated_tokenizer_json(tmp_path):
    shutil.copy(qwen_tokenizer_folder() / "tokenizer.json", tmp_path)
    with (tmp_path / "tokenizer.json").open("r+b") as file:
        file.truncate(1_000_000)
    with pytest.raises(QrunError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"), [(b"{", "is not JSON"), (b"\xff", "is not JSON"), (b"[]", "JSON object")]
)
def test_a_malformed_tokenizer_config(tiny, content, message):
    (tiny / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(QrunError, match=f"tokenizer_config.json .*{message}"):
        Tokenizer.from_folder(tiny)


def test_a_prompt_that_was_not_utf_8(qwen):
    """What Python makes of a Latin-1 byte in a command line: half a surrogate pair."""
    with pytest.raises(QrunError, match=r"U\+DCE9\) at index 3"):
        qwen.encode("caf\udce9")
