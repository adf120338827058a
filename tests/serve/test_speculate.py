"""Guesses in the server: if these fail, an answer depends on whether several tokens were tried at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

import qrun
from tests.fakes import FakeSession, fake_manifest, fake_model
from tests.serve.serving import metric, ready, serving, until

CHAT = "/v1/chat/completions"

# How many tokens are guessed depends on what steps take, which no test may leave to the machine.
pytestmark = pytest.mark.usefixtures("even_steps")


def asked(number: int) -> dict:
    """Of each kind one: greedy, sampled with a seed, penalised, under a form, of several answers."""
    kinds = [
        {"temperature": 0},
        {"temperature": 1.2, "seed": 5},
        {"temperature": 0, "frequency_penalty": 0.5},
        {"temperature": 1.0, "seed": 1, "regex": "(ab|ba){20,40}", "ignore_eos": False},
        {"temperature": 0.8, "seed": 3, "n": 2},
    ]
    words = "one two three one two three " * (1 + number % 3)
    return {
        "model": "m",
        "messages": [{"role": "user", "content": words}],
        "max_tokens": 40 + number,
        "ignore_eos": True,
        **kinds[number % len(kinds)],
    }


def answer(address: str, number: int) -> list[str]:
    response = httpx.post(address + CHAT, json=asked(number), timeout=120)
    assert response.status_code == 200, response.text
    return [choice["message"]["content"] for choice in response.json()["choices"]]


def guessed(address: str) -> float:
    return metric(address, "qrun_guessed_tokens")


def test_answers_are_those_without_guesses_alone_and_side_by_side(tiny_export):
    """In fp32; with 8 or 4 bits the last bits of a step of several tokens may turn a near tie."""
    with serving({"m": qrun.open(tiny_export, threads=1)}) as address:
        wanted = [answer(address, number) for number in range(10)]
    model = qrun.open(tiny_export, threads=1)
    model.speculate = True
    with serving({"m": model}) as address, ThreadPoolExecutor(4) as pool:
        assert [answer(address, number) for number in range(10)] == wanted
        tried = guessed(address)
        assert tried > 0
        assert list(pool.map(lambda number: answer(address, number), range(10))) == wanted
        until(lambda: ready(address)["m"]["active"] == 0)


def test_several_that_repeat_themselves_are_guessed_side_by_side(served_tokenizer):
    """And an answer that was given before is guessed from the past, unless none are kept."""
    letters = served_tokenizer.encode("abcdefgh")

    def rule(seen):
        return letters[len(seen) % len(letters)]

    def told(**engine):
        manifest = fake_manifest(context_length=2048)
        model = fake_model(served_tokenizer, rule, manifest=manifest)
        model.session = FakeSession(rule, manifest)
        model.speculate = True
        asked = {"model": "m", "prompt": "ab", "max_tokens": 400, "temperature": 0, "n": 3}
        short = {**asked, "max_tokens": 9, "n": 1}
        with serving({"m": model}, **engine) as address:
            both = httpx.post(f"{address}/v1/completions", json=asked, timeout=60).json()
            assert len({choice["text"] for choice in both["choices"]}) == 1
            several = guessed(address)
            assert several > 100
            assert metric(address, "qrun_accepted_tokens") > several / 2
            again = httpx.post(f"{address}/v1/completions", json=short, timeout=60).json()
            assert again["choices"][0]["text"] == both["choices"][0]["text"][:9]
            return guessed(address) - several

    # Nothing of so short an answer repeats itself: all of it is known from before, or nothing.
    assert told() > 0
    assert told(suffix_tokens=0) == 0
