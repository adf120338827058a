"""If these fail, a batch reads in pieces that are slow, or reads common beginnings again and again."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from qrun.batch.beginnings import LONG, piece_tokens
from qrun.batch.requests import BatchLines, Prompts
from qrun.batch.sources import Row
from qrun.decoding.pieces import PIECE
from qrun.folder.manifest import KVFacts, PrefillFacts
from tests.fakes import fake_manifest

MANIFEST = fake_manifest()
INSTRUCTION = "Decide whether the review is positive, negative or neutral, and answer with one word. " * 20


def text(seed: int, words: int) -> str:
    drawn = random.Random(seed)
    return " ".join("".join(drawn.choices("abcdefgh", k=5)) for _ in range(words))


def rows(texts) -> list[Row]:
    return [Row(number, {"prompt": each}) for number, each in enumerate(texts, 1)]


def batch_rows(prompts) -> list[Row]:
    return [
        Row(
            number,
            {
                "custom_id": str(number),
                "method": "POST",
                "url": "/v1/completions",
                "body": {"model": "any", "prompt": each},
            },
        )
        for number, each in enumerate(prompts, 1)
    ]


def test_prompts_of_their_own_are_read_in_long_pieces():
    assert piece_tokens(rows(text(n, 200) for n in range(50)), Prompts("prompt"), MANIFEST) == LONG


def test_a_long_instruction_before_every_prompt_is_found_again():
    asked = [INSTRUCTION + text(n, 30) for n in range(50)]
    assert piece_tokens(rows(asked), Prompts("prompt"), MANIFEST) == PIECE
    system = Prompts("prompt", system=INSTRUCTION)
    assert piece_tokens(rows(text(n, 30) for n in range(50)), system, MANIFEST) == PIECE


def test_a_short_instruction_is_not_worth_short_pieces():
    assert (
        piece_tokens(rows("Translate: " + text(n, 200) for n in range(50)), Prompts("prompt"), MANIFEST)
        == LONG
    )


@pytest.mark.parametrize(("common", "length"), [(0, LONG), (800, PIECE)])
def test_token_ids_are_looked_at_too(common, length):
    drawn = random.Random(1)
    begin = [drawn.randrange(10_000, 99_999) for _ in range(common)]
    prompts = [begin + [drawn.randrange(10_000, 99_999) for _ in range(150)] for _ in range(50)]
    assert piece_tokens(batch_rows(prompts), BatchLines(), MANIFEST) == length


def test_looking_uses_up_no_custom_id():
    """Every line was refused: its custom_id stood in an earlier line, the one that had been looked at."""
    maker, found = BatchLines(), batch_rows(["a", "b"])
    piece_tokens(found, maker, MANIFEST)
    assert [maker.line(row).problem for row in found] == [None, None]


def test_broken_rows_and_no_rows_are_nothing_to_look_at():
    broken = [Row(1, {"other": 5}), Row(2, {"prompt": None})]
    assert piece_tokens(broken, Prompts("prompt"), MANIFEST) == LONG
    assert piece_tokens([], Prompts("prompt"), MANIFEST) == LONG


def test_a_graph_whose_attention_is_slow_for_long_pieces_gets_short_ones():
    """int8 with a cache of 8 bits read prompts at half its rate in pieces of 512."""
    asked = rows(text(n, 200) for n in range(50))
    cache = KVFacts("int8", 128)
    one_graph = replace(MANIFEST, kv=cache)
    assert piece_tokens(asked, Prompts("prompt"), one_graph) == PIECE
    two_graphs = replace(one_graph, prefill=PrefillFacts("prefill.onnx", 16))
    assert piece_tokens(asked, Prompts("prompt"), two_graphs) == LONG
    plan = replace(MANIFEST, target="tensorrt")
    assert piece_tokens(asked, Prompts("prompt"), plan) == PIECE
