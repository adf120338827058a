"""If these fail, a draft model changes an answer, guesses what it cannot, or costs more than it gains."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import qrun
from qrun.cli.main import main
from qrun.decoding.draft import Draft
from qrun.decoding.generate import Context, Finished, generate
from qrun.errors import QrunError
from qrun.sampling.params import SamplingParams
from tests.fakes import FakeSession, fake_manifest
from tests.qrun.drafting import PROMPT, check_equal, draft_of, eager, telling, told

# On sessions without a model, which answer by a rule over what their cache holds.


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_answers_are_the_same_sampled_penalised_and_ended_ones_too(data: st.DataObject) -> None:
    params = SamplingParams(
        max_tokens=data.draw(st.integers(1, 80)),
        temperature=data.draw(st.sampled_from([0.5, 3.0, 8.0])),
        do_sample=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 5)),
        repetition_penalty=data.draw(st.sampled_from([1.0, 1.3])),
        eos_token_ids=tuple(data.draw(st.sets(st.integers(0, 199), max_size=20))),
    )
    check_equal(params, wrong_at=data.draw(st.integers(1, 9)))


def test_what_was_wrong_is_forgotten_so_that_the_next_guesses_are_right_again() -> None:
    """The draft depends on all that it holds: with one wrong token left in it, nothing would come true."""
    found = check_equal(SamplingParams(max_tokens=120), wrong_at=5)
    assert found.accepted >= 80
    assert found.guessed > found.accepted


def test_a_good_draft_takes_fewer_steps() -> None:
    session = FakeSession(telling, fake_manifest(context_length=512))
    with eager():
        found = told(session, SamplingParams(max_tokens=100), Draft(FakeSession(telling, session.manifest)))
    assert found.accepted == found.guessed >= 75
    assert len(session.fed) < 30


def test_a_draft_of_a_shorter_context_guesses_as_long_as_it_fits() -> None:
    draft = FakeSession(telling, fake_manifest(context_length=40))
    with eager():
        found = told(FakeSession(telling, fake_manifest(context_length=200)), SamplingParams(), Draft(draft))
    assert found.reason == "context"
    assert len(found.tokens) == 200 - len(PROMPT) + 1
    assert 20 < found.accepted <= 36


def test_tokens_beyond_its_vocabulary_are_neither_guessed_nor_read() -> None:
    """Of the same tokenizer, one of two models may pad its logits further, and its sampler may draw there."""
    params = SamplingParams(max_tokens=20)
    manifest = fake_manifest()
    object.__setattr__(manifest.model, "vocab_size", 150)

    def rule(seen: list[int]) -> int:
        return 140 if len(seen) < 15 else 150

    draft = FakeSession(lambda seen: 160 if len(seen) % 3 == 0 else 140, manifest)
    with eager():
        found = told(FakeSession(rule), params, Draft(draft))
    assert found.tokens == told(FakeSession(rule), params).tokens
    assert max(found.tokens) == 150
    assert found.accepted > 2
    assert max(max(fed) for fed in draft.fed) < 150


def test_a_draft_that_fails_ends_no_answer(caplog: pytest.LogCaptureFixture) -> None:
    draft = FakeSession(telling)

    def forward(*_: object) -> Any:
        raise QrunError("no memory")

    draft.forward = forward  # type: ignore[method-assign]
    params = SamplingParams(max_tokens=30)
    with eager(), caplog.at_level(logging.WARNING, "qrun.engine"):
        found = told(FakeSession(telling), params, Draft(draft))
    assert found.tokens == told(FakeSession(telling), params).tokens
    assert caplog.messages == ["the draft model is given up: no memory"]


def test_the_next_turn_reads_only_what_is_new() -> None:
    manifest = fake_manifest(context_length=512)
    draft = FakeSession(draft_of(telling), manifest)
    context = Context(FakeSession(telling, manifest), draft=Draft(draft))
    with eager():
        list(generate(context, list(range(100, 180)), SamplingParams(max_tokens=20)))
        before = sum(map(len, draft.fed))
        list(generate(context, [*context.token_ids, 7, 8], SamplingParams(max_tokens=20)))
    assert sum(map(len, draft.fed)) - before < 60


class Clock:
    """Seconds that pass in steps of fake sessions only."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        for place in ("scheduler", "draft", "sequence"):
            patch.setattr(f"qrun.decoding.{place}.perf_counter", lambda: self.now)

    def timed(self, session: FakeSession, seconds: float) -> FakeSession:
        """Its steps take ``seconds``, and a quarter more for each further token, up to 16 times as much."""
        real = session.forward

        def forward(token_ids, cache, logits="last"):
            self.now += seconds * min(16, 1 + 0.25 * (token_ids.shape[1] - 1))
            return real(token_ids, cache, logits)

        session.forward = forward  # type: ignore[method-assign]
        return session


@pytest.mark.parametrize(
    ("wrong_at", "seconds", "least", "most"),
    [
        pytest.param(10_000, 0.001, 0.0, 0.5, id="always right, a tenth of the time"),
        pytest.param(8, 0.002, 0.0, 0.8, id="mostly right, a fifth of the time"),
        pytest.param(1, 0.001, 1.0, 1.06, id="never right"),
        pytest.param(10_000, 0.010, 0.9, 1.06, id="always right, and as slow as the model"),
        pytest.param(2, 0.004, 0.9, 1.06, id="half right, and not much faster"),
    ],
)
def test_a_good_draft_gains_and_a_bad_one_costs_little(
    monkeypatch: pytest.MonkeyPatch, wrong_at: int, seconds: float, least: float, most: float
) -> None:
    """Time of an answer of 600 tokens, in times of the same without a draft; by a clock of the test's own."""
    manifest = fake_manifest(context_length=1024)
    clock, params = Clock(monkeypatch), SamplingParams(max_tokens=600)
    told(clock.timed(FakeSession(telling, manifest), 0.010), params)
    alone, clock.now = clock.now, 0.0
    draft = FakeSession(draft_of(telling, wrong_at=wrong_at), manifest)
    told(clock.timed(FakeSession(telling, manifest), 0.010), params, Draft(clock.timed(draft, seconds)))
    assert least <= clock.now / alone <= most


# On real sessions.

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


# Commands.


def run(*words: str, stdin: str | None = None) -> Any:
    return CliRunner().invoke(main, [*words], input=stdin)


def test_the_commands_tell_what_came_true(target: Path, draft: Path) -> None:
    asked = ["--engine", str(target), "--draft", str(draft)]
    with eager():
        done = run("generate", *asked, "--prompt", "abcabc", "--raw", "--greedy", "--json", "-v")
        assert done.exit_code == 0, done.output
        assert '"guessed_tokens": 0' not in done.output
        assert "draft: tiny" in done.stderr
        done = run("bench", *asked, "-p", "8", "-n", "16", "-r", "1")
        assert done.exit_code == 0, done.output
        assert "guessed in steps of several tokens" in done.output
        assert "\ndraft: tiny, " in done.output
        done = run("bench", *asked, "-p", "8", "-n", "16", "-r", "1", "--json", "--speculate")
        assert done.exit_code == 0, done.output
        facts = json.loads(done.stdout)
        assert facts["draft"]["precision"] in ("fp32", "int8", "int4")
        done = run("chat", *asked, "--greedy", "--max-tokens", "8", stdin="hello\n/stats\n")
        assert done.exit_code == 0, done.output
        assert "came true" in done.output


def other_vocabulary(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    one, other = (text for text, key in vocabulary.items() if key in (97, 98))
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    path.write_text(json.dumps(content))


@pytest.fixture
def strange(target: Path, tmp_path: Path) -> Path:
    made = Path(shutil.copytree(target, tmp_path / "strange"))
    other_vocabulary(made)
    return made


def test_a_draft_of_another_vocabulary_is_refused_with_both_folders(target: Path, strange: Path) -> None:
    done = run("generate", "--engine", str(target), "--draft", str(strange), "--prompt", "a")
    assert done.exit_code == 1
    told = " ".join(done.stderr.split())
    assert "the draft has another vocabulary than the model: token 97 is " in told
    assert str(strange) in done.stderr.replace("\n", "")
    assert str(target) in done.stderr.replace("\n", "")
    assert "same tokenizer" in told
    with pytest.raises(QrunError, match="another vocabulary"):
        qrun.open(target).use_draft(strange)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "no such model folder"),
        ("file.txt", "neither a model folder nor a .onnx file nor a .plan"),
        ("empty", "is not a folder that qconvert made"),
        ("model.plan", "a draft is a model folder: a plan cannot guess for another model"),
        ("no tokenizer", "has no tokenizer.json"),
    ],
)
@pytest.mark.parametrize("command", [["generate", "--prompt", "a"], ["chat"], ["bench"]])
def test_what_is_no_draft_is_refused(
    target: Path, tmp_path: Path, name: str, message: str, command: list[str]
) -> None:
    path = tmp_path / name
    if name == "empty":
        path.mkdir()
    elif name == "no tokenizer":
        shutil.copytree(target, path)
        (path / "tokenizer.json").unlink()
    elif name != "nowhere":
        path.write_text("")
    done = run(*command, "--engine", str(target), "--draft", str(path), stdin="")
    assert done.exit_code == 1, done.output
    assert message in " ".join(done.stderr.split())


def test_a_bench_of_several_rows_takes_no_draft(target: Path) -> None:
    done = run("bench", "--engine", str(target), "--draft", str(target), "--rows", "2")
    assert done.exit_code == 2
    assert "--draft is for one answer at a time" in done.output


def test_finished_is_the_last_event_with_a_draft_too(target: Path) -> None:
    model = qrun.open(target, threads=1)
    model.use_draft(target, threads=1)
    *_, end = generate(model.new_context(), [1, 2, 3], SamplingParams(max_tokens=1))
    assert isinstance(end, Finished)
    assert end.guessed_tokens == 0
