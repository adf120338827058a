"""If these fail, a draft model changes the answers of a real one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qrun
from qrun.decoding.generate import Context, Finished, generate
from qrun.sampling.params import SamplingParams
from tests.qrun.drafting import eager

Exporter = Callable[..., Path]


@pytest.fixture(scope="module")
def target(exporter: Exporter) -> Path:
    return exporter(max_position_embeddings=1024)


@pytest.fixture(scope="module", params=["rounded", "another", "shorter"])
def draft(request: pytest.FixtureRequest, exporter: Exporter) -> Path:
    if request.param == "rounded":
        return exporter("int4", max_position_embeddings=1024)
    if request.param == "another":
        return exporter(seed=1, max_position_embeddings=1024)
    return exporter("int8", max_position_embeddings=64)


ASKED: dict[str, dict[str, Any]] = {
    "greedy": {"max_tokens": 60, "ignore_eos": True, "temperature": 0},
    "sampled": {"max_tokens": 60, "ignore_eos": True, "temperature": 1.1, "top_p": 0.9, "seed": 4},
    "penalised": {"max_tokens": 60, "temperature": 0.8, "seed": 2, "repetition_penalty": 1.2},
    "one token": {"max_tokens": 1, "temperature": 0},
    "regex": {"regex": "(ab|ba){20,40}", "temperature": 1.0, "seed": 1, "max_tokens": 50},
    "schema": {"schema": {"type": "array", "items": {"type": "integer"}}, "max_tokens": 40, "temperature": 0},
}


def last(model: qrun.Model, prompt: str, **asked: Any) -> qrun.Answer:
    *_, answer = model.generate(prompt, **asked)
    assert isinstance(answer, qrun.Answer)
    return answer


def test_answers_of_a_real_model_are_those_without_a_draft(target: Path, draft: Path) -> None:
    """In fp32; with 8 or 4 bits the last bits of a step of several tokens may turn a near tie."""
    model = qrun.open(target, threads=1)
    plain = {name: last(model, "one two three", **asked) for name, asked in ASKED.items()}
    text = plain["greedy"].text
    stop = {"stop": [text[len(text) // 2 :][:3]], **ASKED["greedy"]}
    stopped = last(model, "one two three", **stop)
    assert stopped.finish_reason == "stop"
    model.use_draft(draft, threads=1)
    guessed = 0
    with eager():
        for name, asked in ASKED.items():
            found = last(model, "one two three", **asked)
            assert (name, found.token_ids) == (name, plain[name].token_ids)
            assert (found.text, found.finish_reason) == (plain[name].text, plain[name].finish_reason)
            guessed += found.guessed_tokens
        found = last(model, "one two three", **stop)
    assert (found.text, found.stop) == (stopped.text, stopped.stop)
    assert guessed > 50


def test_a_cancelled_answer_ends_and_the_next_one_is_whole(target: Path) -> None:
    model = qrun.open(target, threads=1)
    asked = {"max_tokens": 40, "ignore_eos": True, "temperature": 0}
    plain = last(model, "one two", **asked)
    model.use_draft(target, threads=1)
    params, _ = model.resolve(asked)
    context = model.new_context()
    with eager():
        answering = model.answering(model.tokenizer.encode("one two"), params, context=context)
        for each in answering.events():
            event = each
            if len(answering.token_ids) == 7 and answering.finish_reason is None:
                answering.cancel()
        assert isinstance(event, qrun.Answer)
        assert event.finish_reason == "cancelled"
        assert event.token_ids == plain.token_ids[: len(event.token_ids)]
        found = last(model, "one two", context=context, **asked)
    assert found.token_ids == plain.token_ids
    assert found.accepted_tokens > 20


@pytest.mark.slow
@pytest.mark.export
@pytest.mark.timeout(900)
def test_the_sample_says_the_same_with_itself_in_4_bits_as_a_draft(
    sample_checkpoint: Path, tmp_path: Path
) -> None:
    from qconvert.export import ExportOptions, export
    from qconvert.progress import Progress

    def made(**options: Any) -> Path:
        asked = ExportOptions(**options, output=tmp_path / options["precision"], verify=False)
        return export(str(sample_checkpoint), asked, Progress(quiet=True)).folder

    model = qrun.open(made(precision="fp32"))
    prompt = "The history of the lighthouse begins in"
    kinds: list[dict[str, Any]] = [{"temperature": 0}, {"temperature": 1.0, "seed": 3}]
    plain = [last(model, prompt, max_tokens=64, **asked) for asked in kinds]
    model.use_draft(made(precision="int4", recipe="rtn"))
    with eager():
        found = [last(model, prompt, max_tokens=64, **asked) for asked in kinds]
    assert [each.token_ids for each in found] == [each.token_ids for each in plain]
    assert sum(each.accepted_tokens for each in found) > 32


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_with_8_or_4_bits_only_a_near_tie_may_turn(exporter: Exporter, precision: str) -> None:
    model = qrun.open(exporter(precision, max_position_embeddings=1024), threads=1)
    prompt = np.random.default_rng(1).integers(0, 256, 40).tolist()
    asked = {"max_tokens": 48, "ignore_eos": True, "temperature": 0}
    *_, plain = model.generate(prompt, **asked)
    model.use_draft(exporter(max_position_embeddings=1024), threads=1)
    with eager():
        *_, found = model.generate(prompt, **asked)
    assert isinstance(plain, qrun.Answer)
    assert isinstance(found, qrun.Answer)
    pairs = zip(plain.token_ids, found.token_ids)
    differs = next((at for at, (one, other) in enumerate(pairs) if one != other), None)
    if differs is not None:
        context = Context(model.session)
        logits = context.feed([*prompt, *plain.token_ids[:differs]], logits="last")
        assert logits[plain.token_ids[differs]] - logits[found.token_ids[differs]] < 0.1
    assert found.guessed_tokens > 0


def test_an_engine_guesses_with_it_while_one_answer_decodes(target: Path) -> None:
    model = qrun.open(target, threads=1)
    asked = {"max_tokens": 40, "ignore_eos": True, "temperature": 0}
    plain = last(model, "one two", **asked)
    model.use_draft(target, threads=1)

    async def whole(engine: qrun.Engine) -> tuple[int, ...]:
        async for event in engine.generate("one two", **asked):
            last_event = event
        assert isinstance(last_event, qrun.Answer)
        return last_event.token_ids

    with eager(), qrun.Engine(model, slots=2) as engine:
        assert asyncio.run(whole(engine)) == plain.token_ids
        assert engine.speculation is not None
        assert engine.speculation.accepted > 20


def test_finished_is_the_last_event_with_a_draft_too(target: Path) -> None:
    model = qrun.open(target, threads=1)
    model.use_draft(target, threads=1)
    *_, end = generate(model.new_context(), [1, 2, 3], SamplingParams(max_tokens=1))
    assert isinstance(end, Finished)
    assert end.guessed_tokens == 0
