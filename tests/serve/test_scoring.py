"""Log-probabilities of a prompt's own tokens: what evaluation harnesses ask /v1/completions for."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest

import qrun
from qrun.decoding.scheduler import SCORED_CHUNK
from tests.fakes import fake_manifest, fake_model, repeating
from tests.serve.serving import serving

TEXT = "The quick brown fox jumps over the lazy dog, twice, and once more; then it sleeps. " * 2


@pytest.fixture(scope="module")
def model(tiny_export):
    return qrun.open(tiny_export, threads=1)


@pytest.fixture(scope="module")
def asking(model):
    with serving({"m": model}, slots=3) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0)
        yield lambda **fields: client.completions.create(model="m", **{"temperature": 0, **fields})


def reference(model, ids):
    """Log-probabilities ``[tokens - 1, vocab]`` from one forward pass over all tokens."""
    logits = model.session.forward(np.array([ids]), model.session.new_cache(), "all")[0].astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return (logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True)))[:-1]


@pytest.mark.parametrize("as_tokens", [False, True])
def test_each_token_of_a_prompt_has_the_probability_that_the_model_gives_it(model, asking, as_tokens):
    ids = model.tokenizer.encode(TEXT)
    assert len(ids) > 3 * SCORED_CHUNK, "several pieces"
    prompt = ids if as_tokens else TEXT
    choice = asking(prompt=prompt, echo=True, logprobs=3, max_tokens=0).choices[0]
    wanted = reference(model, ids)
    found = choice.logprobs
    assert (choice.text, choice.finish_reason) == (TEXT, "length")
    assert found.token_logprobs[0] is None
    assert found.top_logprobs[0] is None
    own = [wanted[place, token_id] for place, token_id in enumerate(ids[1:])]
    assert np.allclose(found.token_logprobs[1:], own, atol=1e-4)
    assert "".join(found.tokens) == TEXT
    assert found.text_offset == list(range(len(TEXT)))  # a token is a letter here
    for place, top in enumerate(found.top_logprobs[1:]):
        assert len(top) <= 4, "the likeliest ones, and the token itself"
        likeliest = np.sort(wanted[place])[-3:]
        assert np.isclose(max(top.values()), likeliest[-1], atol=1e-4)
        # This model has ids without a token, which all have the same text: fewer than 3 may be left.
        others = [value for token, value in top.items() if token != found.tokens[place + 1]]
        assert all(np.isclose(value, likeliest, atol=1e-4).any() for value in others)
        assert top[found.tokens[place + 1]] == found.token_logprobs[place + 1]


def test_an_answer_follows_the_prompt_in_the_same_lists(asking):
    echoed = asking(prompt=TEXT, echo=True, logprobs=1, max_tokens=5)
    alone = asking(prompt=TEXT, logprobs=1, max_tokens=5)
    (whole,), (answer,) = echoed.choices, alone.choices
    assert whole.text == TEXT + answer.text
    assert whole.logprobs.tokens[-5:] == answer.logprobs.tokens
    assert np.allclose(whole.logprobs.token_logprobs[-5:], answer.logprobs.token_logprobs, atol=1e-4)
    assert whole.logprobs.text_offset[-5:] == [len(TEXT) + each for each in answer.logprobs.text_offset]
    assert (echoed.usage.prompt_tokens, echoed.usage.completion_tokens) == (len(TEXT), 5)


def test_a_stream_gives_the_same_lists(asking):
    asked = {"prompt": [TEXT, "abc"], "echo": True, "logprobs": 2, "max_tokens": 4}
    whole = asking(**asked).choices
    texts, tokens, values, offsets = ({0: [], 1: []} for _ in range(4))
    for chunk in asking(**asked, stream=True):
        (choice,) = chunk.choices
        texts[choice.index].append(choice.text)
        if choice.logprobs is not None:
            tokens[choice.index] += choice.logprobs.tokens
            values[choice.index] += choice.logprobs.token_logprobs
            offsets[choice.index] += choice.logprobs.text_offset
    for index, choice in enumerate(whole):
        assert "".join(texts[index]) == choice.text
        assert tokens[index] == choice.logprobs.tokens
        assert values[index] == choice.logprobs.token_logprobs
        assert offsets[index] == choice.logprobs.text_offset


def test_texts_and_token_ids_may_stand_in_one_list(model, asking):
    prompts = [TEXT, model.tokenizer.encode("abc"), "x"]
    found = asking(prompt=prompts, echo=True, logprobs=0, max_tokens=0).choices
    assert [choice.text for choice in found] == [TEXT, "abc", "x"]
    assert [len(choice.logprobs.tokens) for choice in found] == [len(TEXT), 3, 1]
    assert all(len(top) == 1 for top in found[0].logprobs.top_logprobs[1:])


def test_the_same_numbers_come_under_any_load_and_whatever_was_asked_before(asking):
    """A prompt that began like an earlier one took that one's beginning from the cache, without logits."""
    texts = [TEXT[:60] + str(number) * number for number in range(40, 48)]

    def ask(text):
        return asking(prompt=text, echo=True, logprobs=2, max_tokens=3).choices[0].to_dict()

    alone = [ask(text) for text in texts]
    with ThreadPoolExecutor(16) as pool:
        others = [pool.submit(asking, prompt=text, max_tokens=30) for text in texts]
        again = list(pool.map(ask, texts))
        assert all(other.result().choices for other in others)
    assert again == alone


def test_logits_are_never_computed_for_more_than_a_piece(model, monkeypatch):
    """A prompt of 4,096 tokens and Qwen's vocabulary would take 2.5 GB at once."""
    forward, most = model.session.forward, []
    monkeypatch.setattr(
        model.session,
        "forward",
        lambda ids, cache, logits="last": (
            most.append(ids.shape[1] if logits == "all" else 1) or forward(ids, cache, logits)
        ),
    )
    with serving({"m": model}) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0)
        client.completions.create(model="m", prompt=TEXT, echo=True, logprobs=1, max_tokens=0)
    assert max(most) == SCORED_CHUNK


def test_no_tokens_without_echo_is_an_empty_answer(asking):
    found = asking(prompt=["abc", "d"], max_tokens=0)
    assert [(choice.text, choice.finish_reason) for choice in found.choices] == [("", "length")] * 2
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (4, 0)
    assert asking(prompt="abc", max_tokens=0, echo=True).choices[0].text == "abc"


def test_one_token_is_in_the_lists_even_if_it_ends_the_answer(served_tokenizer):
    """lm-eval asks for one token and drops the last of the lists: it would drop one of the prompt's."""
    ending = fake_model(served_tokenizer, lambda seen: 258, manifest=fake_manifest())
    with serving({"m": ending}) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0)
        asked = {"model": "m", "prompt": "abc", "echo": True, "logprobs": 1}
        found = client.completions.create(**asked, max_tokens=1).choices[0]
        assert found.text == "abc"
        assert found.logprobs.tokens == ["a", "b", "c", "<|im_end|>"]
        more = client.completions.create(**asked, max_tokens=2).choices[0]
        assert (more.text, more.finish_reason) == ("abc", "stop")


def test_tokens_that_are_part_of_a_character_are_given_by_their_bytes(served_tokenizer):
    """Two of them had the same text, U+FFFD, and the less likely one hid the likelier."""
    model = fake_model(served_tokenizer, repeating(served_tokenizer, "é"), manifest=fake_manifest())
    with serving({"m": model}) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0)
        asked = {"model": "m", "prompt": "aé", "echo": True, "logprobs": 1, "max_tokens": 0}
        found = client.completions.create(**asked).choices[0].logprobs
        assert found.tokens == ["a", "bytes:\\xc3", "bytes:\\xa9"]
        assert found.text_offset == [0, 1, 1]
        chat = {"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
        told = client.chat.completions.create(**chat, logprobs=True).choices[0].logprobs.content
        assert sorted(each.bytes for each in told) == [[0xA9], [0xC3]]
