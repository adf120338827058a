"""If these fail, a real vocabulary that went through a GGUF file gives other token ids than its original."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from qconvert.checkpoint.gguf.metadata import Fields
from qconvert.checkpoint.gguf.vocabulary import Vocabulary
from tests.assets import REPOSITORY, qwen3_tokenizer_folder, qwen_tokenizer_folder

# Texts on which llama.cpp compares its own tokenizers with their originals, and more.
TEXTS = [
    *(
        "",
        " ",
        "  ",
        "\t",
        "\n",
        "\n\n",
        "\t\n",
        "Hello world",
        " Hello World!",
        "Hello, y'all! How are you 😁 ?",
    ),
    *("w048 7tuijk dsdfhu", "нещо на Български", "កាន់តែពិសេសអាចខលចេញ", "🚀 (normal) 😶‍🌫️ (multiple emojis)"),
    *(
        "3",
        "33",
        "333",
        "3333",
        "333333333",
        "12345.6789e-10",
        "Cửa Việt",
        "' era",
        "I'Ve I'LL we'D",
        "ﬁne e\u0301",
    ),
    *(
        "<|im_start|>user\nHi<|im_end|>",
        '<tool_call>\n{"a": 1}\n</tool_call>',
        "<|endoftext|>",
        "<think>x</think>",
    ),
    *(
        "a\r\nb\r\n\r\n c",
        "x = [1,2 ,3]  # ok\n\n\n\treturn",
        "你好，世界！2024年12月",
        "ــمرحبا ١٢٣",
        "½ Ⅷ ٣",
        "\u00a0\u3000\u200b",
    ),
]


def through_gguf(folder: Path) -> tuple[Tokenizer, Vocabulary]:
    """The tokenizer as the entries of a GGUF file say it, which are made as llama.cpp's converter does."""
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    ids = {token_id: token for token, token_id in content["model"]["vocab"].items()}
    types = dict.fromkeys(ids, 1)
    for token in content["added_tokens"]:
        ids[token["id"]] = token["content"]
        types[token["id"]] = 3 if token["special"] else 4
    size = max(ids) + 200  # as many as the embedding has rows
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    entries: dict[str, Any] = {
        "tokenizer.ggml.model": b"gpt2",
        "tokenizer.ggml.pre": b"qwen2",
        "tokenizer.ggml.tokens": [ids.get(each, f"[PAD{each}]").encode() for each in range(size)],
        "tokenizer.ggml.token_type": _numbers([types.get(each, 5) for each in range(size)]),
        "tokenizer.ggml.merges": [merge.encode() for merge in merges],
        "tokenizer.ggml.eos_token_id": next(each for each, token in ids.items() if token == "<|im_end|>"),
        "tokenizer.ggml.add_bos_token": False,
    }
    vocabulary = Vocabulary(Fields(folder / "m.gguf", entries))
    return Tokenizer.from_str(json.dumps(vocabulary.tokenizer_json())), vocabulary


def _numbers(values: list[int]) -> Any:
    import numpy as np

    return np.array(values, dtype=np.int32)


@pytest.mark.parametrize("folder", [qwen_tokenizer_folder, qwen3_tokenizer_folder], ids=["qwen2.5", "qwen3"])
def test_every_text_gives_the_original_s_ids(folder: Any) -> None:
    ours, vocabulary = through_gguf(folder())
    theirs = Tokenizer.from_file(str(folder() / "tokenizer.json"))
    pages = [path.read_text(encoding="utf-8") for path in sorted((REPOSITORY / "docs").glob("*.md"))]
    code = [path.read_text(encoding="utf-8") for path in sorted((REPOSITORY / "qconvert").rglob("*.py"))]
    for text in [*TEXTS, *pages, *code]:
        ids = theirs.encode(text).ids
        assert ours.encode(text).ids == ids, text[:60]
        assert ours.decode(ids) == theirs.decode(ids)
    assert ours.get_vocab() == theirs.get_vocab()
    assert [ours.id_to_token(each) for each in vocabulary.ends()] == ["<|im_end|>", "<|endoftext|>"]
