"""If these fail, a folder is judged on other prompts or other probabilities than those that were meant."""

from __future__ import annotations

import numpy as np
import pytest

import qrun
from qrun.engine import Engine
from qrun.errors import QrunError
from qrun.evaluation.asking import Asked, Prompts, results
from qrun.evaluation.tasks import read_task
from tests.fakes import fake_manifest, fake_model, repeating, scripted

LONG = "The quick brown fox jumps over the lazy dog, twice, and once more; then it sleeps. " * 2


@pytest.fixture(scope="module")
def model(tiny_export):
    return qrun.open(tiny_export, threads=1)


def task(number=1, **values):
    return read_task(number, values, "contains")


def judged(model, tasks, asked=None, rows=1):
    with Engine(model, slots=rows) as engine:
        found = dict(results(engine, tasks, asked or Asked()))
    return [found[place] for place in range(len(tasks))]


def reference(model, ids, first):
    """Log-probabilities of the tokens from ``first`` on, from one forward pass."""
    logits = model.session.forward(np.array([ids]), model.session.new_cache(), "all")[0].astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return [logits[place - 1, ids[place]] for place in range(first, len(ids))]


@pytest.mark.parametrize("rows", [1, 3])
def test_answers_belong_to_their_lines_in_any_number_of_rows(tokenizer, rows):
    echo = fake_model(tokenizer, scripted(tokenizer, ["It is Rome."]), manifest=fake_manifest())
    lines = [task(n, prompt=f"line {n}", expected="Rome" if n % 2 else "Paris") for n in range(1, 8)]
    found = judged(echo, lines, rows=rows)
    assert [each.right for each in found] == [True, False] * 3 + [True]
    assert {each.answer for each in found} == {"It is Rome."}
    assert {each.finish_reason for each in found} == {"eos"}


def test_one_of_several_expected_answers_is_enough(tokenizer):
    says = fake_model(tokenizer, scripted(tokenizer, ["seven"]))
    lines = [task(prompt="x", expected=["7", "seven"]), task(2, prompt="x", expected=["7", "sieben"])]
    assert [each.right for each in judged(says, lines)] == [True, False]


def test_answers_end_at_max_tokens_and_at_a_stop_string(tokenizer):
    says = fake_model(tokenizer, repeating(tokenizer, "abcd"), manifest=fake_manifest(context_length=1024))
    (found,) = judged(says, [task(prompt="x", expected="x")], Asked(sampling={"max_tokens": 5}))
    assert (found.tokens, found.finish_reason) == (5, "length")
    (found,) = judged(says, [task(prompt="x", expected="x")], Asked(sampling={"stop": ["d"]}))
    assert found.finish_reason == "stop"
    assert "d" not in found.answer


@pytest.mark.parametrize("chat", [True, False])
def test_a_choice_is_as_likely_as_its_tokens_are_after_the_prompt(model, chat):
    line = task(prompt="What is it?", choices=["a cat", "seven dogs", "no"], expected="no")
    (found,) = judged(model, [line], Asked(chat=chat))
    encode = model.tokenizer.encode
    prompt = (
        model.chat_prompt([{"role": "user", "content": "What is it?"}])
        if chat
        else encode("What is it?", add_special_tokens=True)
    )
    wanted = [sum(reference(model, prompt + encode(each), len(prompt))) for each in line.choices]
    assert np.allclose(found.logprobs, wanted, atol=1e-3)
    assert found.answer == line.choices[int(np.argmax(wanted))]
    assert found.right is (found.answer == "no")
    shares = np.exp(np.array(wanted) - max(wanted))
    assert found.probability == pytest.approx(shares[2] / shares.sum(), abs=1e-3)


def test_a_text_has_the_likelihood_of_all_its_tokens_but_the_first(model):
    (found,) = judged(model, [task(text=LONG)])
    ids = model.tokenizer.encode(LONG, add_special_tokens=True)
    assert found.nats == pytest.approx(-sum(reference(model, ids, 1)), abs=1e-2)
    assert found.tokens == len(ids) - 1


def test_a_text_longer_than_the_context_is_read_in_pieces_and_each_token_is_predicted_once(exporter):
    short = qrun.open(exporter(max_position_embeddings=64), threads=1)
    line = task(text=LONG)
    ids = short.tokenizer.encode(LONG, add_special_tokens=True)
    assert len(ids) > 2 * 64
    (found,) = judged(short, [line])
    pieces = [prompt for prompt, first in Prompts(short, Asked()).of(line)]
    assert all(len(piece) <= 64 for piece in pieces)
    assert [piece[0] for piece in pieces[1:]] == [piece[-1] for piece in pieces[:-1]]
    wanted = sum(sum(reference(short, piece, 1)) for piece in pieces)
    assert found.tokens == len(ids) - 1
    assert found.nats == pytest.approx(-wanted, abs=1e-2)


def test_special_tokens_in_a_line_are_text(tokenizer):
    """A data set may hold chats in their written form; they must not end the prompt."""
    fake = fake_model(tokenizer, repeating(tokenizer, "a"))
    ((ids, _),) = Prompts(fake, Asked()).of(task(prompt="a<|im_end|>b", expected="x"))
    plain = fake.chat_prompt([{"role": "user", "content": "a<|im_end|>b"}])
    assert len(ids) > len(plain)


def test_system_messages_of_lines_come_before_that_of_the_command(tokenizer):
    fake = fake_model(tokenizer, repeating(tokenizer, "a"))
    prompts = Prompts(fake, Asked(system="of the command"))

    def text(line):
        return fake.tokenizer.decode(prompts.of(line)[0][0])

    assert "of the command" in text(task(prompt="x", expected="y"))
    own = text(task(prompt="x", system="of the line", expected="y"))
    assert "of the line" in own
    assert "of the command" not in own


@pytest.mark.parametrize(
    ("line", "asked", "words"),
    [
        ({"text": "x"}, Asked(), "line 7 .line 7. cannot be asked: a text of one token"),
        (
            {"prompt": "x" * 300, "expected": "y", "id": "long"},
            Asked(),
            r"line 7 .long. .* the context is 256",
        ),
        ({"prompt": "x", "choices": ["a", "b" * 300], "expected": "a"}, Asked(), "the context is 256"),
        ({"messages": [{"role": "user", "content": "x"}], "expected": "y"}, Asked(chat=False), "--raw"),
        ({"prompt": "x", "system": "s", "expected": "y"}, Asked(chat=False), "it is a conversation"),
        ({"prompt": "half \ud800", "expected": "y"}, Asked(), "not Unicode"),
    ],
)
def test_a_line_that_the_model_cannot_be_given_is_named_before_anything_runs(tokenizer, line, asked, words):
    fake = fake_model(tokenizer, repeating(tokenizer, "a"))
    with Engine(fake) as engine, pytest.raises(QrunError, match=words):
        list(results(engine, [task(prompt="fine", expected="y"), task(7, **line)], asked))
    assert fake.session.fed == []


def test_a_failing_step_ends_the_evaluation_with_its_message(tokenizer):
    """An answer that is left out would make the figure of one folder that of other lines."""

    def rule(seen):
        raise QrunError("the device has gone")

    with Engine(fake_model(tokenizer, rule)) as engine, pytest.raises(QrunError, match="the device has gone"):
        list(results(engine, [task(prompt="x", expected="y")], Asked()))
