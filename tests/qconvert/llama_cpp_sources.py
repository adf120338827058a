"""Tiny models in F32 for ``llama_cpp_files.py``: python -m tests.qconvert.llama_cpp_sources FOLDER."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.qconvert.ggufs import make_gguf
from tests.tiny import LLAMA3

SOURCES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {"num_hidden_layers": 2}),
    "qwen3": ("qwen3", {"num_hidden_layers": 2}),
    "llama": (
        "llama",
        {"num_hidden_layers": 2, "rope_parameters": {**LLAMA3, "original_max_position_embeddings": 8192}},
    ),
    "wide": (
        "qwen2",
        {"num_hidden_layers": 1, "hidden_size": 256, "intermediate_size": 256, "num_key_value_heads": 1},
    ),
}


def make_source(name: str, root: Path) -> Path:
    """One of them, in a folder of its own."""
    family, settings = SOURCES[name]
    return make_gguf(root / name, family, **settings)[1]


if __name__ == "__main__":
    for each in SOURCES:
        with tempfile.TemporaryDirectory() as scratch:
            shutil.copy(make_source(each, Path(scratch)), Path(sys.argv[1]) / f"{each}.gguf")
