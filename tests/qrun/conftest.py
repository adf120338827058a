"""Tiny random models, exported once by the product's own export, and copies of them to break."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qrun.backends.ort.wheels import check_onnxruntime_version
from qrun.errors import QrunError
from qrun.folder.manifest import read_manifest
from qrun.text.tokenizer import Tokenizer
from tests.export_tiny import export_tiny
from tests.fakes import REPOSITORY, tiny_tokenizer

Exporter = Callable[..., Path]


@pytest.fixture(scope="session")
def exporter(tmp_path_factory: pytest.TempPathFactory) -> Exporter:
    """Exports a tiny checkpoint; the same arguments give the same folder, read-only for tests.

    With an ONNX Runtime that has no KV cache of 8 bits, tests that run one are skipped.
    Where torch is not installed, ``QCONVERT_TEST_PYTHON`` names a Python of an environment that has it.
    """
    made: dict[str, Path] = {}

    def make(
        precision: str = "fp32",
        *,
        prefill: bool = False,
        block_size: int | None = None,
        int8_kv_cache: bool = False,
        runs_here: bool = True,
        **checkpoint: Any,
    ) -> Path:
        options = {
            "precision": precision,
            "prefill": prefill,
            "block_size": block_size,
            "int8_kv_cache": int8_kv_cache,
        }
        key = f"{options} {sorted(checkpoint.items())}"
        if key not in made:
            root = tmp_path_factory.mktemp("export")
            if elsewhere := os.environ.get("QCONVERT_TEST_PYTHON"):
                given = json.dumps({"options": options, "checkpoint": checkpoint})
                command = [elsewhere, "-m", "tests.export_tiny", str(root), given]
                subprocess.run(command, check=True, cwd=REPOSITORY, capture_output=True)
            else:
                export_tiny(root, options, checkpoint)
            made[key] = root / "model"
        if runs_here and int8_kv_cache:
            try:
                check_onnxruntime_version(read_manifest(made[key]))
            except QrunError as error:
                pytest.skip(error.what)  # `make test-oldest`: the reason names the version that it needs
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
