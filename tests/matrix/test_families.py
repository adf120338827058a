"""Qwen3 and Llama with vocabularies of real size, in every precision and recipe, each with its own proof.

``make test-matrix`` runs all of them, ``make test`` one of each family.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from qconvert.export import ExportOptions, export
from qconvert.progress import Progress
from qrun.folder.manifest import read_manifest
from tests.real_llama import same_greedy_tokens
from tests.tiny import make_tiny_checkpoint

QUIET = Progress(quiet=True)
# Heads that are wider than the residual stream, and Llama 3.2's tied head and stretched frequencies.
SIZES: dict[str, dict[str, Any]] = {
    "qwen3": {"vocab_size": 151_936, "head_dim": 32},
    "llama": {"vocab_size": 128_256},
}
_COMMON = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 32}
REPRESENTATIVE = {"precision": "int4", "prefill": True, "int8_kv_cache": True}
OPTIONS: list[dict[str, Any]] = [
    REPRESENTATIVE,
    {"precision": "fp32"},
    {"precision": "fp16"},
    {"precision": "int8"},
    {"precision": "int8", "block_size": 32},
    {"precision": "int8", "int8_kv_cache": True},
    {"precision": "int4", "recipe": "rtn"},
    {"precision": "int4", "recipe": "rtn", "prefill": True},
    {"precision": "int4", "recipe": "rtn", "int8_kv_cache": True},
    {"precision": "int4", "recipe": "awq"},
    {"precision": "int4", "recipe": "awq-mixed"},
    # On the package's text: after the tests' short one rounding costs the tiny Llama's sharp twin too much.
    {
        "precision": "int4",
        "recipe": "awq-mixed",
        "prefill": True,
        "int8_kv_cache": True,
        "calibrate": "default",
    },
    {"precision": "int4", "recipe": "gptq"},
    {"precision": "int4", "recipe": "gptq-mixed"},
    {"precision": "int4", "recipe": "gptq", "prefill": True, "int8_kv_cache": True},
    {"target": "tensorrt", "precision": "bf16"},
    {"target": "tensorrt", "precision": "fp16"},
    {"target": "tensorrt", "precision": "fp32"},
    {"target": "tensorrt", "precision": "int4"},
]
EVERY = [
    pytest.param(
        family,
        options,
        id=f"{family} {options}",
        marks=() if options == REPRESENTATIVE else pytest.mark.matrix,
    )
    for family in SIZES
    for options in OPTIONS
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("matrix")
    return cache(
        lambda family: make_tiny_checkpoint(root / family, family=family, **_COMMON, **SIZES[family])
    )


@pytest.mark.parametrize(("family", "options"), EVERY)
def test_it_is_exported_and_proven(
    made: Callable[[str], Path], text: str, output: Path, family: str, options: dict[str, Any]
) -> None:
    calibrate = text if options.get("recipe") not in (None, "rtn") else None
    chosen = ExportOptions(**{"calibrate": calibrate, **options}, output=output)
    done = export(str(made(family)), chosen, QUIET)
    assert done.report is not None
    assert done.report.passed
    assert read_manifest(output).model.vocab_size == SIZES[family]["vocab_size"]


@pytest.mark.parametrize("family", SIZES)
def test_greedy_answers_are_those_of_transformers(
    made: Callable[[str], Path], output: Path, family: str
) -> None:
    checkpoint = made(family)
    export(str(checkpoint), ExportOptions(precision="fp32", output=output, verify=False), QUIET)
    prompts = [[72, 101, 108, 108, 111], [257, 5, 200_000 % SIZES[family]["vocab_size"], 31_000]]
    same_greedy_tokens(output, checkpoint, prompts, tokens=12)
