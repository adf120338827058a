"""The arithmetic of the comparison: if it is wrong, the report claims what was not measured."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.compare.figures import quality_table
from benchmarks.compare.peers import PEERS, Contender, contenders
from benchmarks.compare.summary import (
    Quality,
    advantage,
    behind_in_quality,
    behind_in_speed,
    best_advantage,
    paired_ratio,
    qualities,
    rows,
)

OURS = Contender(PEERS["qconvert"], "int4")
LLAMA = Contender(PEERS["llama_cpp"], "Q4_0")
TRANSFORMERS = Contender(PEERS["transformers"], "bf16")


def record(contender: Contender, number: int, seconds: float, *, rss: int = 100) -> dict[str, Any]:
    workload = {
        "prompt_tokens": 512,
        "generated_tokens": 65,
        "first_token_seconds": seconds,
        "decode_seconds": seconds * 2,
        "peak_rss_bytes": rss,
    }
    result = {"load_seconds": 1.0, "first_answer_seconds": 1.5, "workloads": [workload]}
    key = {"peer": contender.peer.name, "variant": contender.variant, "shape": "0.5b", "round": number}
    return {"key": key, "result": result}


def failed(contender: Contender, number: int) -> dict[str, Any]:
    key = {"peer": contender.peer.name, "variant": contender.variant, "shape": "0.5b", "round": number}
    return {"key": key, "failed": "exit code 1: out of memory"}


def converted(*chosen: Contender) -> dict[str, Any]:
    return {contender.name: {"model_bytes": 7} for contender in chosen}


def test_ratio_is_taken_round_by_round_so_a_slow_spell_cancels_out() -> None:
    ours, peer = {1: 100.0, 2: 10.0, 3: 100.0}, {1: 50.0, 2: 5.0, 3: 50.0}
    assert paired_ratio(ours, peer) == 2.0
    # Of the medians it would be 2 as well; a slow spell that hits unequal rounds tells the two apart.
    assert paired_ratio({1: 100.0, 2: 10.0}, {1: 50.0, 2: 5.0, 3: 400.0}) == 2.0


def test_ratio_without_a_common_round_is_none() -> None:
    assert paired_ratio({1: 1.0}, {2: 1.0}) is None


def test_rates_follow_from_seconds_and_the_first_token_is_no_decode_step() -> None:
    [row] = rows([OURS], "0.5b", 512, converted(OURS), [record(OURS, 1, 2.0)])
    assert row.median("prompt") == 256.0
    assert row.median("decode") == 16.0  # 64 steps in 4 s
    assert row.median("first_token") == 2.0


def test_advantage_is_above_one_when_we_are_better_in_either_direction() -> None:
    measured = [record(OURS, 1, 1.0, rss=50), record(LLAMA, 1, 2.0, rss=100)]
    ours, peer = rows([OURS, LLAMA], "0.5b", 512, converted(OURS, LLAMA), measured)
    assert advantage("prompt", ours, peer) == 2.0
    assert advantage("first_token", ours, peer) == 2.0
    assert advantage("memory", ours, peer) == 2.0


def test_failed_conversion_is_a_row_that_says_why() -> None:
    conversions = {LLAMA.name: {"failed": "no space left"}}
    [row] = rows([LLAMA], "0.5b", 512, conversions, [])
    assert row.failed == "conversion: no space left"
    assert row.median("prompt") is None
    assert row.to_json()["failed"] == "conversion: no space left"


def test_failed_round_is_told_and_the_others_count() -> None:
    measured = [record(LLAMA, 1, 1.0), failed(LLAMA, 2)]
    [row] = rows([LLAMA], "0.5b", 512, converted(LLAMA), measured)
    assert row.median("prompt") == 512.0
    assert row.failed == "round 2: exit code 1: out of memory"


def test_another_shape_or_prompt_never_mixes_in() -> None:
    [row] = rows([OURS], "1.5b", 512, converted(OURS), [record(OURS, 1, 1.0)])
    assert row.failed == "not measured"
    [row] = rows([OURS], "0.5b", 128, converted(OURS), [record(OURS, 1, 1.0)])
    assert row.failed == "not measured"


def test_where_we_are_behind_comes_from_the_figures() -> None:
    chosen = [OURS, LLAMA, TRANSFORMERS]
    measured = [record(OURS, 1, 2.0), record(LLAMA, 1, 1.0), record(TRANSFORMERS, 1, 4.0)]
    found = behind_in_speed(rows(chosen, "0.5b", 512, converted(*chosen), measured), ["prompt"])
    assert [(entry.ours, entry.peer, entry.factor) for entry in found] == [
        ("qconvert int4", "llama.cpp Q4_0", 0.5)
    ]


def test_a_peer_of_16_bits_is_paired_with_our_8_bits() -> None:
    int8 = Contender(PEERS["qconvert"], "int8")
    chosen = [OURS, int8, TRANSFORMERS]
    measured = [record(OURS, 1, 1.0), record(int8, 1, 2.0), record(TRANSFORMERS, 1, 4.0)]
    all_rows = rows(chosen, "0.5b", 512, converted(*chosen), measured)
    best = best_advantage("prompt", all_rows[2], all_rows)
    assert best is not None
    assert (best[0].contender.variant, best[1]) == ("int8", 2.0)


def test_quality_behind_means_less_divergence_from_no_more_bytes() -> None:
    def quality(contender: Contender, kl: float) -> dict[str, Any]:
        key = {"peer": contender.peer.name, "variant": contender.variant, "text": "prose"}
        return {"key": key, "result": {"mean_kl": kl, "top1": 0.9, "perplexity": 20.0}}

    measured = [quality(OURS, 0.3), quality(LLAMA, 0.2)]
    sizes = {OURS.name: {"model_bytes": 100}, LLAMA.name: {"model_bytes": 90}}
    [found] = behind_in_quality(qualities([OURS, LLAMA], sizes, measured))
    assert found.factor == pytest.approx(0.2 / 0.3)
    sizes[LLAMA.name]["model_bytes"] = 110
    assert behind_in_quality(qualities([OURS, LLAMA], sizes, measured)) == []


def test_ours_take_part_without_being_named_and_unknown_names_are_refused() -> None:
    names = [contender.name for contender in contenders(["llama_cpp:Q4_0"])]
    assert names == [*(f"qconvert {v}" for v in PEERS["qconvert"].variants), "llama_cpp Q4_0"]
    assert [contender.name for contender in contenders(["qconvert:int8"])] == ["qconvert int8"]
    everyone = {c.name: c.quality_only for c in contenders(["all", "qconvert:int4-gptq"])}
    assert len(everyone) == sum(len(peer.variants) for peer in PEERS.values())
    assert not everyone["qconvert int4-gptq"], "who is named is measured in speed as well"
    assert everyone["qconvert int4-gptq-mixed"]
    with pytest.raises(KeyError):
        contenders(["lama"])
    with pytest.raises(KeyError):
        contenders(["llama_cpp:Q5"])


def test_every_peer_has_its_program_and_its_pins() -> None:
    for peer in PEERS.values():
        assert peer.program.is_file()
        pins = [line for line in peer.requirements.read_text().splitlines() if line and line[0] not in "#-"]
        assert pins
        assert all("==" in line for line in pins), peer.name


def test_the_references_perplexities_stand_below_their_texts() -> None:
    """They once stood in the order in which the texts were measured."""
    figures = {"mean_kl": 0.1, "top1": 0.9, "perplexity": 20.0}
    by_text = {
        "prose": {**figures, "reference_perplexity": 3.0},
        "code": {**figures, "reference_perplexity": 1.0},
        "german": {**figures, "reference_perplexity": 2.0},
    }
    entry = Quality(Contender(PEERS["openvino"], "int8"), 1_000_000, by_text)
    header, lines = quality_table([entry])
    assert header[-3:] == ["perplexity code", "perplexity german", "perplexity prose"]
    assert lines[-1][-3:] == ["1.00", "2.00", "3.00"]
