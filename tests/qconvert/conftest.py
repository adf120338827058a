"""Tiny checkpoints to break, one fresh copy for each test."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.qconvert.building import TinyExports
from tests.tiny import make_tiny_checkpoint


@pytest.fixture(scope="session")
def tiny_templates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("templates")
    return {
        "tied": make_tiny_checkpoint(root / "tied"),
        "sharded": make_tiny_checkpoint(root / "sharded", sharded=True, tie_word_embeddings=False),
    }


@pytest.fixture
def tied(tiny_templates: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_templates["tied"], tmp_path / "tied"))


@pytest.fixture
def sharded(tiny_templates: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_templates["sharded"], tmp_path / "sharded"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> TinyExports:
    """Folders for TensorRT by their precision, exported once for a file of tests."""
    return TinyExports(tmp_path_factory.mktemp("exports"))


@pytest.fixture
def folder(exported: TinyExports, tmp_path: Path) -> Path:
    """A copy of one of them, to be changed."""
    return Path(shutil.copytree(exported("bf16"), tmp_path / "model"))
