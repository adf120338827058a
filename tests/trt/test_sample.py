"""If this fails, a real model answers otherwise through the session for plans than through ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import pytest

from qconvert.export import ExportOptions, export
from qconvert.progress import Progress
from qrun.backends.opening import open_session
from qrun.backends.session import Session
from qrun.backends.trt.session import TrtSession
from qrun.decoding.generate import Context, Token, generate
from qrun.sampling.params import SamplingParams
from qrun.text.tokenizer import Tokenizer
from tests.emulated.device import EmulatedDevice
from tests.emulated.plans import build_emulated_plan

pytestmark = pytest.mark.slow

TOKENS = 128
PROMPT = "The capital of France is Paris. The capital of Italy is"


def greedy(session: Session, prompt: list[int]) -> list[int]:
    events = generate(Context(session), prompt, SamplingParams(max_tokens=TOKENS, ignore_eos=True))
    return [event.token_id for event in events if isinstance(event, Token)]


def test_128_greedy_tokens_of_the_sample_model_are_the_onnx_runtime_paths(
    sample_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: EmulatedDevice
) -> None:
    options = ExportOptions(
        target="tensorrt", precision="bf16", max_length=160, output=tmp_path / "model", verify=False
    )
    folder = export(str(sample_checkpoint), options, Progress(quiet=True)).folder
    plan = build_emulated_plan(folder, monkeypatch, prompt_length=8)
    prompt = Tokenizer.from_folder(folder).encode(PROMPT)
    assert len(prompt) > 8  # more than the profile takes at once
    session = open_session(plan)
    assert isinstance(session, TrtSession)
    with session:
        tokens = greedy(session, prompt)
        assert session.graph_state == "captured"
    assert device.graph_launches == TOKENS - 2  # all steps but the first; the last token is never fed
    del session
    assert len(tokens) == TOKENS
    assert len(set(tokens)) > 20  # no loop over a few tokens, which would agree by chance
    assert tokens == greedy(open_session(folder, threads=2), prompt)
