"""What only a GPU can show: run by ``make test-gpu``, skipped elsewhere. Nothing here has run yet.

If these fail, a plan computes something else than PyTorch or the CPU, or other tokens through a CUDA graph.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from qconvert.checkpoint.load import load_model, open_checkpoint
from qconvert.export import ExportOptions, export
from qconvert.progress import Progress
from qconvert.proof.finished import verify_folder
from qconvert.proof.limits import LIMITS, limit_value
from qconvert.tensorrt.plan import BuildOptions, build
from qrun.backends.opening import open_session
from qrun.cli.bench import Workload
from qrun.text.tokenizer import Tokenizer
from tests.gpu.checks import NEAR_TIE, against_pytorch, exchanged_choices, greedy, open_plan, speed_and_memory

# PyTorch's side runs on the CPU, which takes its time.
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800)]

QUIET = Progress(quiet=True)
PROMPT = "The capital of France is Paris. The capital of Italy is"
TEXT = "If these fail, a plan computes something else than PyTorch or the CPU. " * 4


@pytest.fixture(scope="module")
def plan(sample_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample model in bf16, built for this GPU by whichever TensorRT is installed."""
    output = tmp_path_factory.mktemp("gpu") / "model"
    options = ExportOptions(target="tensorrt", precision="bf16", max_length=768, output=output, verify=False)
    folder = export(str(sample_checkpoint), options, QUIET).folder
    return build(folder, BuildOptions(prompt_length=128), QUIET).path


@pytest.fixture(scope="module")
def prompt(plan: Path) -> list[int]:
    return Tokenizer.from_folder(plan.parent).encode(PROMPT)


def test_the_plan_passes_the_verification_against_pytorch(plan: Path, sample_checkpoint: Path) -> None:
    report = verify_folder(plan, str(sample_checkpoint), QUIET)
    assert report.failed == ()


@pytest.mark.parametrize("first", [1, 20, 60], ids=["token by token", "a short prompt", "nearly whole"])
def test_its_logits_are_pytorchs_within_the_limits_of_bf16(
    plan: Path, sample_checkpoint: Path, first: int
) -> None:
    ids = np.array([Tokenizer.from_folder(plan.parent).encode(TEXT)[:64]], dtype=np.int64)
    model = load_model(open_checkpoint(sample_checkpoint)).float()
    with open_plan(plan) as session:
        rows = against_pytorch(session, model, ids, prompt=first)
    mean_limit = min(limit.values["bf16"] for limit in LIMITS if limit.key == "mean_kl")
    assert rows.non_finite_at is None
    assert rows.kl.mean() <= mean_limit
    assert rows.kl.max() <= limit_value("max_kl", "bf16")


def test_a_cuda_graph_changes_no_token(plan: Path, prompt: list[int]) -> None:
    with open_plan(plan, cuda_graph=False) as session:
        plain = greedy(session, prompt, 128)
        assert session.graph_state == "off"
    with open_plan(plan) as session:
        assert greedy(session, prompt, 128) == plain
        assert session.graph_state == "captured"


def test_its_first_choices_are_the_cpus_but_for_near_ties(plan: Path, prompt: list[int]) -> None:
    with open_plan(plan) as session:
        exchanges = exchanged_choices(session, open_session(plan.parent), prompt, 128)
    assert max((exchange.margin for exchange in exchanges), default=0.0) <= NEAR_TIE
    assert len(exchanges) <= 12  # of 128


def test_a_prompt_longer_than_the_profile_is_the_same_in_its_pieces(plan: Path, prompt: list[int]) -> None:
    """Whole pieces of 128 tokens, and pieces of 50: the last logits must agree as near ties do."""
    ids = np.array([(prompt * 30)[:300]], dtype=np.int64)
    with open_plan(plan) as session:
        whole = session.forward(ids, session.new_cache())[0, 0].copy()
        cache = session.new_cache()
        for start in range(0, 300, 50):
            pieces = session.forward(ids[:, start : start + 50], cache)[0, 0]
    assert np.abs(whole - pieces).max() <= NEAR_TIE


def test_closing_gives_the_memory_back(plan: Path, prompt: list[int]) -> None:
    """The driver keeps something of its own, so the second opening is compared with the first."""
    left = []
    for _ in range(2):
        with open_plan(plan) as session:
            greedy(session, prompt, 4)
            gpu = session.gpu
        left.append(gpu.free_bytes())
    assert left[1] >= left[0] - (64 << 20)


def test_speed_and_memory_are_written_down(plan: Path, tmp_path: Path) -> None:
    """Nothing is asserted of speed. QCONVERT_GPU_RESULTS names the file; `make test-gpu` sets it."""
    results = [
        speed_and_memory(plan, Workload(512, 128), repetitions=5, cuda_graph=cuda_graph)
        for cuda_graph in (True, False)
    ]
    path = Path(os.environ.get("QCONVERT_GPU_RESULTS", tmp_path / "plan.json"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results))
    assert all(result["results"]["decode_tokens_per_second"] > 0 for result in results)
