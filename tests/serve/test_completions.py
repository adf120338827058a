"""Both kinds of completion as OpenAI's own client sees them, over a real socket."""

from __future__ import annotations

import json

import httpx
import openai
import pytest

USER = [{"role": "user", "content": "hello"}]


def test_a_chat_is_answered_whole(client):
    found = client.chat.completions.create(model="echo", messages=USER)
    (choice,) = found.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == (
        "assistant",
        "hello",
        "stop",
    )
    assert found.object == "chat.completion"
    assert (found.model, found.usage.completion_tokens) == ("echo", 5)
    assert found.usage.total_tokens == found.usage.prompt_tokens + 5


def test_a_stream_has_a_role_then_text_then_a_reason_then_usage(client):
    chunks = list(
        client.chat.completions.create(
            model="echo", messages=USER, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "hello"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 5
    assert len({chunk.id for chunk in chunks}) == 1


def test_parts_of_text_are_joined_and_a_developer_is_the_system(client):
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
    found = client.chat.completions.create(model="echo", messages=messages)
    assert found.choices[0].message.content == "one two"


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_an_answer_ends_at_its_length(client, name):
    found = client.chat.completions.create(model="long", messages=USER, **{name: 7})
    assert (found.choices[0].finish_reason, len(found.choices[0].message.content)) == ("length", 7)


@pytest.mark.parametrize("stop", ["gh", ["zz", "gh"]])
def test_a_stop_string_is_no_part_of_the_answer(client, stop):
    found = client.chat.completions.create(model="long", messages=USER, stop=stop)
    assert found.choices[0].finish_reason == "stop"
    assert found.choices[0].message.content.endswith("f") or found.choices[0].message.content == ""
    stream = client.chat.completions.create(model="long", messages=USER, stop=stop, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == found.choices[0].message.content


def test_several_answers_have_indices_and_the_prompt_counts_once(client):
    found = client.chat.completions.create(model="echo", messages=USER, n=3)
    assert [choice.index for choice in found.choices] == [0, 1, 2]
    assert {choice.message.content for choice in found.choices} == {"hello"}
    alone = client.chat.completions.create(model="echo", messages=USER)
    assert found.usage.prompt_tokens == alone.usage.prompt_tokens
    assert found.usage.completion_tokens == 15


def test_log_probabilities_come_whole_and_in_streams(client):
    asked = {"model": "echo", "messages": USER, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**asked).choices[0].logprobs.content
    assert [each.token for each in whole] == list("hello")
    assert all(each.logprob == each.top_logprobs[0].logprob > each.top_logprobs[1].logprob for each in whole)
    streamed = [
        each
        for chunk in client.chat.completions.create(**asked, stream=True)
        if chunk.choices[0].logprobs
        for each in chunk.choices[0].logprobs.content
    ]
    assert streamed == whole


def test_a_bias_changes_the_answer(client, served_tokenizer):
    (letter,) = served_tokenizer.encode("z")
    found = client.chat.completions.create(
        model="long", messages=USER, max_tokens=3, logit_bias={str(letter): 100}
    )
    assert found.choices[0].message.content == "zzz"


def test_ours_are_extensions(client):
    found = client.chat.completions.create(
        model="echo", messages=USER, max_tokens=9, extra_body={"ignore_eos": True, "top_k": 5, "min_p": 0.1}
    )
    assert found.usage.completion_tokens == 9


def test_plain_prompts_as_text_as_tokens_and_in_lists(client, served_tokenizer):
    ids = served_tokenizer.encode("xyz")
    texts = [
        [
            choice.text
            for choice in client.completions.create(model="base", prompt=prompt, max_tokens=4).choices
        ]
        for prompt in ("xyz", ids, ["xyz", "xyz"], [ids, ids])
    ]
    assert texts[0] == texts[1]
    assert texts[2] == texts[3] == texts[0] * 2
    assert len(texts[0][0]) == 4


def test_an_echo_stands_before_the_answer_and_the_default_length_is_16(client):
    found = client.completions.create(model="base", prompt="xyz", echo=True)
    assert found.choices[0].text.startswith("xyz")
    assert len(found.choices[0].text) == 19
    chunks = client.completions.create(model="base", prompt="xyz", echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == found.choices[0].text


def test_log_probabilities_of_plain_completions(client):
    found = (
        client.completions.create(model="base", prompt="xyz", max_tokens=3, logprobs=2).choices[0].logprobs
    )
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == 3
    assert found.text_offset == [0, 1, 2]
    assert found.top_logprobs[0][found.tokens[0]] == found.token_logprobs[0]


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["echo", "long", "base"]
    assert client.models.retrieve("long").id == "long"
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'; there are: echo, long, base"):
        client.chat.completions.create(model="other", messages=USER)


def test_text_and_tokens_go_both_ways(address):
    tokens = httpx.post(f"{address}/tokenize", json={"content": "hi <|im_end|>", "model": "echo"}).json()[
        "tokens"
    ]
    back = httpx.post(f"{address}/detokenize", json={"tokens": tokens, "model": "echo"}).json()
    assert back == {"content": "hi <|im_end|>"}
    prompt = httpx.post(f"{address}/apply-template", json={"messages": USER, "model": "echo"}).json()[
        "prompt"
    ]
    assert prompt == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


def test_a_prompt_beyond_the_context_names_both_numbers(client):
    with pytest.raises(
        openai.BadRequestError, match=r"the prompt has 3,\d\d\d tokens, .* context is 2,048"
    ) as error:
        client.chat.completions.create(model="echo", messages=[{"role": "user", "content": "x" * 3000}])
    assert error.value.code == "context_length_exceeded"


def test_a_silent_stream_is_kept_alive_with_comments(served_tokenizer):
    import time

    from tests.fakes import fake_model, scripted
    from tests.serve.serving import serving

    rule = scripted(served_tokenizer, ["hi"])

    def slow(seen: list[int]) -> int:
        time.sleep(0.3)
        return rule(seen)

    with serving({"slow": fake_model(served_tokenizer, slow)}, ping_seconds=0.05) as address:
        asked = {"model": "slow", "messages": USER, "stream": True}
        with httpx.stream("POST", f"{address}/v1/chat/completions", json=asked) as response:
            lines = [line for line in response.iter_lines() if line]
    assert ": ping" in lines
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    assert "".join(json.loads(each)["choices"][0]["delta"].get("content", "") for each in data[:-1]) == "hi"
