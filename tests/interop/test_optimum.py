"""If these fail, optimum's ORTModelForCausalLM no longer opens an export unchanged, or answers otherwise.

It runs the graph with caches that grow by one token and asks for logits at every position.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

from qrun.backends.opening import open_session
from tests.interop.cases import NEW_TOKENS, Case, Exported
from tests.interop.texts import TEXTS


@cache
def load(folder: Path) -> ORTModelForCausalLM:
    return ORTModelForCausalLM.from_pretrained(folder)


def test_same_greedy_tokens(exported: Exported, case: Case) -> None:
    prompt = torch.tensor([exported.prompts[case.name]])
    output = load(exported.folder).generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS, do_sample=False
    )
    answer = output[0, prompt.shape[1] :].tolist()
    if case.ends:  # transformers returns the end token too
        assert answer.pop() in exported.end_tokens
    assert answer == exported.answers[case.name]


def test_the_same_logits_at_every_position(exported: Exported) -> None:
    """One pass over prompt and answer, by both programs: the same graph on the same numbers."""
    token_ids = [exported.prompts["list"] + exported.answers["list"]]
    ids = torch.tensor(token_ids)
    logits = load(exported.folder)(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    session = open_session(exported.folder)
    own = session.forward(np.array(token_ids), session.new_cache(), "all")
    assert np.abs(logits.numpy() - own).max() < 1e-4


@pytest.mark.parametrize("text", TEXTS)
def test_same_token_ids(exported: Exported, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported.folder)
    assert tokenizer(text)["input_ids"] == exported.tokenizer.encode(text)
