"""The exported sample as `make interop` left it, run once by qrun."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from qrun.backends.opening import open_session
from qrun.decoding.generate import Context, Token, generate
from qrun.sampling.sampler import SamplingParams
from qrun.text.tokenizer import Tokenizer
from tests.interop.cases import CASES, NEW_TOKENS, Case, Exported

# qrun opens its sessions with this switch on, which is the faster attention. The other programs leave ONNX
# Runtime's default, whose float32 sums come in another order: 8-bit rounding of activations makes tenths of a
# logit of that, and near ties turn. With one attention for all, what is left to differ is the programs.
os.environ.setdefault("ORT_GQA_DISABLE_FLASH_ATTENTION", "1")


@pytest.fixture(scope="session", params=("fp32", "int8"))
def exported(request: pytest.FixtureRequest) -> Iterator[Exported]:
    root = os.environ.get("QCONVERT_INTEROP")
    if root is None:
        pytest.fail("QCONVERT_INTEROP names no folder with the exports: run `make interop`")
    folder = Path(root) / request.param
    session = open_session(folder, check_hashes=True)
    tokenizer = Tokenizer.from_folder(folder)
    prompts = {case.name: tokenizer.encode(case.text) for case in CASES}
    end_tokens = session.manifest.eos_token_ids
    params = SamplingParams(max_tokens=NEW_TOKENS, eos_token_ids=end_tokens)
    answers = {
        name: [
            event.token_id for event in generate(Context(session), ids, params) if isinstance(event, Token)
        ]
        for name, ids in prompts.items()
    }
    before = _states(folder)
    yield Exported(folder, tokenizer, end_tokens, prompts, answers)
    assert _states(folder) == before, "another program changed the folder"


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def _states(folder: Path) -> dict[str, tuple[int, int]]:
    paths = folder.rglob("*")
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in paths if path.is_file()}
