"""The model on which the commands of the pages are run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.assets import qwen_tokenizer_folder
from tests.docs.bench import Bench
from tests.tiny import make_tiny_checkpoint

QWEN_VOCABULARY = 151_936  # Qwen2.5's own: what a vocabulary of 320 never meets is met here


@pytest.fixture(scope="session")
def small_bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A random model of two layers with Qwen2.5's vocabulary and tokenizer, and a context of 96 tokens.

    Its answers end after 8 tokens: a random model finds no end by itself.
    """
    root = tmp_path_factory.mktemp("pages")
    checkpoint = make_tiny_checkpoint(
        root / "random-model",
        vocab_size=QWEN_VOCABULARY,
        num_hidden_layers=2,
        max_position_embeddings=96,
        bos_token_id=151_643,
        eos_token_id=151_645,
        pad_token_id=151_643,
        tokenizer=False,
    )
    for file in qwen_tokenizer_folder().iterdir():
        shutil.copy(file, checkpoint)
    defaults = checkpoint / "generation_config.json"
    settings = json.loads(defaults.read_text(encoding="utf-8")) | {"max_new_tokens": 8}
    defaults.write_text(json.dumps(settings), encoding="utf-8")
    return Bench(root / "here", checkpoint, small=True)


@pytest.fixture(scope="session")
def sample_bench(sample_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("pages") / "here", sample_checkpoint, small=False)
