"""YaRN beyond the trained positions: if these fail, long prompts are read as another model would read them.

Source: Peng et al. 2023, "YaRN: Efficient Context Window Extension of Large Language Models",
arXiv:2309.00071.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from qconvert.export import ExportOptions, export
from qconvert.progress import Progress
from qrun.backends.opening import open_session
from qrun.decoding.generate import Context
from tests.tiny import make_tiny_checkpoint

# As the cards of Qwen2.5 describe it for texts beyond 32,768 tokens.
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1e6}
TOKENS, COMPARED = 33_600, 16
# Mean KL of the compared positions; with 8 and 4 bits both graphs and a cache of 8 bits are used.
LIMITS = {"fp32": 1e-9, "int8": 0.03, "int4": 0.5}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(
        tmp_path_factory.mktemp("yarn") / "c", rope_parameters=YARN, max_position_embeddings=32768
    )


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return np.random.default_rng(3).integers(0, 256, TOKENS).tolist()


def logits_of_pytorch(checkpoint: Path, ids: list[int]) -> NDArray[np.float32]:
    """Of the last positions, ``[COMPARED, vocab]``."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        found: NDArray[np.float32] = model(torch.tensor([ids]), logits_to_keep=COMPARED).logits[0].numpy()
    return found


def mean_kl(reference: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Of next-token distributions."""
    p, q = (torch.log_softmax(torch.from_numpy(each).double(), -1) for each in (reference, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.fixture(scope="module")
def reference(checkpoint: Path, ids: list[int]) -> NDArray[np.float32]:
    return logits_of_pytorch(checkpoint, ids)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("precision", LIMITS)
def test_a_prompt_beyond_32768_tokens_is_read_as_pytorch_reads_it(
    checkpoint: Path, ids: list[int], reference: NDArray[np.float32], tmp_path: Path, precision: str
) -> None:
    both = precision != "fp32"
    asked = ExportOptions(precision=precision, prefill=both, int8_kv_cache=both, output=tmp_path / "m")
    folder = export(str(checkpoint), asked, Progress(quiet=True)).folder
    context = Context(open_session(folder))
    assert context.session.manifest.model.context_length == 131_072
    context.feed(ids[:-COMPARED], logits="none")
    found = np.concatenate([context.feed([each], logits="last")[None].copy() for each in ids[-COMPARED:]])
    assert mean_kl(reference, found) < LIMITS[precision]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_without_yarn_such_a_prompt_reads_otherwise(
    checkpoint: Path, ids: list[int], reference: NDArray[np.float32], tmp_path: Path
) -> None:
    """Else the test above would pass whatever the angles are."""
    plain = tmp_path / "plain"
    shutil.copytree(checkpoint, plain)
    config = json.loads((plain / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": YARN["rope_theta"]}
    (plain / "config.json").write_text(json.dumps(config))
    assert mean_kl(reference, logits_of_pytorch(plain, ids)) > 1
