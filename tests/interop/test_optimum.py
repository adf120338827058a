"""If these fail, optimum's ORTModelForCausalLM no longer opens an export unchanged, or answers otherwise.

It runs the graph with caches that grow by one token and asks for logits at every position.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

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


def test_without_a_cache_too(exported: Exported) -> None:
    """One pass over prompt and answer picks every token of the answer again: logits at all positions."""
    prompt, answer = exported.prompts["list"], exported.answers["list"]
    ids = torch.tensor([prompt + answer])
    logits = load(exported.folder)(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    again = logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()
    # The integer products of many positions and of one are summed in another order: int8 may flip a near tie.
    allowed = 0 if exported.folder.name == "fp32" else 2
    assert sum(one != other for one, other in zip(again, answer)) <= allowed


@pytest.mark.parametrize("text", TEXTS)
def test_same_token_ids(exported: Exported, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported.folder)
    assert tokenizer(text)["input_ids"] == exported.tokenizer.encode(text)
