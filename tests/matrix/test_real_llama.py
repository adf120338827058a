"""If one of these fails, a precision answers wrongly on a Llama that was trained, the sample's own weights.

``make test-llama`` runs them, a minute or two each; ``make test`` has the same on random models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import qrun
from qconvert.export import ExportOptions, export
from qconvert.progress import Progress
from tests.real_llama import make_real_llama, same_greedy_tokens

QUIET = Progress(quiet=True)
PROMPTS = ("Name the capital of France.", "Count from one to twenty.", "Write a line about the sea.")
OPTIONS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "fp16": {"precision": "fp16"},
    "int8": {"precision": "int8"},
    "int8, 8-bit cache": {"precision": "int8", "int8_kv_cache": True},
    "int4 awq": {"precision": "int4", "recipe": "awq"},
    "int4 awq-mixed": {"precision": "int4", "recipe": "awq-mixed"},
    "int4 rtn": {"precision": "int4", "recipe": "rtn"},
    "int4 gptq": {"precision": "int4", "recipe": "gptq"},
    "int4 gptq-mixed": {"precision": "int4", "recipe": "gptq-mixed"},
    "int4, prefill": {"precision": "int4", "recipe": "rtn", "prefill": True},
    "int4, 8-bit cache": {"precision": "int4", "recipe": "rtn", "int8_kv_cache": True},
    "int4 awq, prefill, 8-bit cache": {"precision": "int4", "prefill": True, "int8_kv_cache": True},
    "TensorRT bf16": {"target": "tensorrt", "precision": "bf16"},
    "TensorRT fp16": {"target": "tensorrt", "precision": "fp16"},
    "TensorRT int4": {"target": "tensorrt", "precision": "int4"},
}
# Where nothing is rounded but activations to 16 bits: the same tokens as transformers'.
EXACT = ("fp32", "fp16")
# Of the proof's 128 greedy steps, how many PyTorch takes alike with the export's own weights: what is left
# is the rounding of activations.
ALIKE = 0.9


@pytest.fixture(scope="module")
def llama(sample_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_real_llama(sample_checkpoint, tmp_path_factory.mktemp("real") / "SmolLM2-135M-Instruct")


@pytest.mark.real
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", OPTIONS)
def test_a_real_llama_passes_its_proof_and_answers_as_transformers(
    llama: Path, output: Path, name: str
) -> None:
    done = export(str(llama), ExportOptions(**OPTIONS[name], output=output), QUIET)
    report = done.report
    assert report is not None
    assert report.passed
    own = report.greedy.checks.get("own weights", report.greedy.checks["checkpoint"])
    assert own.agreed >= ALIKE * own.steps, (own.agreed, own.steps)
    if name in EXACT:
        template = qrun.open(output).chat_prompt
        prompts = [template([{"role": "user", "content": text}]) for text in PROMPTS]
        same_greedy_tokens(output, llama, prompts, tokens=24)
