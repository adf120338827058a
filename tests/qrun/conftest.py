"""Tiny random models, exported once by the product's own export, and copies of them to break."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qrun.text.streaming import Tokenizer
from tests.fakes import tiny_tokenizer
from tests.tiny import make_tiny_checkpoint

Exporter = Callable[..., Path]


@pytest.fixture(scope="session")
def exporter(tmp_path_factory: pytest.TempPathFactory) -> Exporter:
    """Exports a tiny checkpoint; the same arguments give the same folder, read-only for tests."""
    from qconvert.export import ExportOptions, export
    from qconvert.progress import Progress

    made: dict[str, Path] = {}

    def make(
        precision: str = "fp32",
        *,
        prefill: bool = False,
        block_size: int | None = None,
        int8_kv_cache: bool = False,
        **checkpoint: Any,
    ) -> Path:
        key = f"{precision} {prefill} {block_size} {int8_kv_cache} {sorted(checkpoint.items())}"
        if key not in made:
            root = tmp_path_factory.mktemp("export")
            source = make_tiny_checkpoint(root / "tiny", **checkpoint)
            options = ExportOptions(
                precision=precision,
                prefill=prefill,
                block_size=block_size,
                int8_kv_cache=int8_kv_cache,
                output=root / "model",
                verify=False,
            )
            made[key] = export(str(source), options, Progress(quiet=True)).folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_export(exporter: Exporter) -> Path:
    """A random model in fp32 with a context of 1,024 tokens; read-only."""
    return exporter(max_position_embeddings=1024)


@pytest.fixture
def broken(tiny_export: Path, tmp_path: Path) -> Path:
    """A copy of the tiny export, to be broken."""
    return Path(shutil.copytree(tiny_export, tmp_path / "broken"))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Bytes and ChatML's special tokens."""
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def merging_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The same with one merge, "ab"."""
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), merging=True)
