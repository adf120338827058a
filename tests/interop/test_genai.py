"""If these fail, onnxruntime-genai no longer opens an export unchanged, or answers otherwise."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime_genai as og
import pytest

from tests.interop.cases import NEW_TOKENS, Case, Exported
from tests.interop.texts import TEXTS


@cache
def load(folder: Path) -> og.Model:
    return og.Model(str(folder))


@cache
def load_tokenizer(folder: Path) -> og.Tokenizer:
    return og.Tokenizer(load(folder))


@pytest.mark.parametrize("shared", [True, False], ids=["in-place cache", "growing cache"])
def test_same_greedy_tokens(exported: Exported, case: Case, shared: bool) -> None:
    prompt = exported.prompts[case.name]
    params = og.GeneratorParams(load(exported.folder))
    params.set_search_options(
        max_length=len(prompt) + NEW_TOKENS, do_sample=False, past_present_share_buffer=shared
    )
    generator = og.Generator(load(exported.folder), params)
    generator.append_tokens(np.array([prompt], dtype=np.int32))
    answer = []
    while not generator.is_done():
        generator.generate_next_token()
        answer += generator.get_next_tokens().tolist()
    if case.ends:  # genai reports the end token too (and leaves it out of its sequence)
        assert answer.pop() in exported.end_tokens
    assert answer == exported.answers[case.name]


def test_rewound_sequence_answers_the_same(exported: Exported) -> None:
    """genai cuts its cache back as qrun's chat does; an export must not hide state elsewhere."""
    prompt = exported.prompts["list"]
    params = og.GeneratorParams(load(exported.folder))
    params.set_search_options(max_length=len(prompt) + NEW_TOKENS, do_sample=False)
    generator = og.Generator(load(exported.folder), params)
    generator.append_tokens(np.array([prompt], dtype=np.int32))
    for _ in range(20):
        generator.generate_next_token()
    generator.rewind_to(len(prompt) // 2)
    generator.append_tokens(np.array([prompt[len(prompt) // 2 :]], dtype=np.int32))
    for _ in range(20):
        generator.generate_next_token()
    assert generator.get_sequence(0).tolist()[len(prompt) :] == exported.answers["list"][:20]


@pytest.mark.parametrize("text", TEXTS)
def test_same_token_ids(exported: Exported, text: str) -> None:
    tokenizer = load_tokenizer(exported.folder)
    assert tokenizer.encode(text).tolist() == exported.tokenizer.encode(text)


@pytest.mark.parametrize("text", TEXTS)
def test_same_text(exported: Exported, text: str) -> None:
    """Decoding what was encoded gives the same text; genai leaves special tokens out, as qrun does."""
    token_ids = exported.tokenizer.encode(text)
    decoded = load_tokenizer(exported.folder).decode(np.array(token_ids, dtype=np.int32))
    assert decoded == exported.tokenizer.decode(token_ids)
