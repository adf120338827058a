"""If this fails, the comparisons beside it compare too little to prove anything."""

from __future__ import annotations

from qrun.decoding.generate import PREFILL_CHUNK
from tests.interop.cases import NEW_TOKENS, Case, Exported


def test_answers_are_long_enough_to_compare(exported: Exported, case: Case) -> None:
    length = len(exported.answers[case.name])
    assert length < NEW_TOKENS if case.ends else length == NEW_TOKENS


def test_one_prompt_is_prefilled_in_pieces(exported: Exported) -> None:
    assert len(exported.prompts["long"]) > PREFILL_CHUNK


def test_the_sample_knows_the_capital(exported: Exported) -> None:
    assert "Paris" in exported.tokenizer.decode(exported.answers["end"])
