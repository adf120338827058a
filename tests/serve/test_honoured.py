"""Each field that the server says it honours reaches the sampler, in every API and under all its names."""

from __future__ import annotations

import httpx
import pytest

from qrun.engine import Engine
from tests.fakes import fake_model, repeating
from tests.serve.serving import serving

USER = [{"role": "user", "content": "hello"}]
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
BASE = {
    CHAT: {"messages": USER, "max_tokens": 3},
    COMPLETION: {"prompt": "hello", "max_tokens": 3},
    "/v1/responses": {"input": "hello", "max_output_tokens": 3},
    "/v1/messages": {"messages": USER, "max_tokens": 3},
}
BOTH = [
    ({"temperature": 0.25}, {"temperature": 0.25, "do_sample": True}),
    ({"temperature": 0}, {"do_sample": False}),
    ({"top_p": 0.5}, {"top_p": 0.5}),
    ({"top_k": 7}, {"top_k": 7}),
    ({"min_p": 0.25}, {"min_p": 0.25}),
    ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
    ({"presence_penalty": 1.5}, {"presence_penalty": 1.5}),
    ({"frequency_penalty": -1.5}, {"frequency_penalty": -1.5}),
    ({"seed": 42}, {"seed": 42}),
    ({"stop": "x"}, {"stop": ("x",)}),
    ({"stop": ["x", "y"]}, {"stop": ("x", "y")}),
    ({"logit_bias": {"65": 5, "66": -100}}, {"logit_bias": ((65, 5.0), (66, -100.0))}),
    ({"max_tokens": 2}, {"max_tokens": 2}),
    ({"ignore_eos": True}, {"ignore_eos": True}),
]
CASES = [
    *((path, asked, due) for path in (CHAT, COMPLETION) for asked, due in BOTH),
    (CHAT, {"max_tokens": None, "max_completion_tokens": 2}, {"max_tokens": 2}),
    (CHAT, {"logprobs": True, "top_logprobs": 4}, {"logprobs": 4}),
    (CHAT, {"logprobs": True}, {"logprobs": 0}),
    (COMPLETION, {"logprobs": 4}, {"logprobs": 4}),
    ("/v1/responses", {"temperature": 0.25, "top_p": 0.5}, {"temperature": 0.25, "top_p": 0.5}),
    ("/v1/responses", {"max_output_tokens": 2}, {"max_tokens": 2}),
    (
        "/v1/messages",
        {"temperature": 0.25, "top_p": 0.5, "top_k": 7, "stop_sequences": ["x"], "max_tokens": 2},
        {"temperature": 0.25, "top_p": 0.5, "top_k": 7, "stop": ("x",), "max_tokens": 2},
    ),
]


@pytest.fixture(scope="module")
def served(served_tokenizer):
    """The address of a server, and the parameters of all that it hands to its engine."""
    seen: list = []
    submit = Engine.submit

    def watched(self, prompt_ids, params, listener, **options):
        seen.append(params)
        return submit(self, prompt_ids, params, listener, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "submit", watched)
        with serving({"m": fake_model(served_tokenizer, repeating(served_tokenizer, "abc"))}) as address:
            yield address, seen


@pytest.mark.parametrize(("path", "asked", "due"), CASES, ids=lambda each: str(each)[:60])
def test_a_field_reaches_the_sampler(served, path, asked, due):
    address, seen = served
    seen.clear()
    body = {"model": "m", **BASE[path], **asked}
    answered = httpx.post(
        address + path, json={name: value for name, value in body.items() if value is not None}
    )
    assert answered.status_code == 200, answered.text
    (params,) = seen
    assert {name: getattr(params, name) for name in due} == due


def test_several_answers_have_seeds_of_their_own(served):
    address, seen = served
    seen.clear()
    asked = {"model": "m", **BASE[CHAT], "n": 3, "seed": 5, "temperature": 1}
    assert len(httpx.post(address + CHAT, json=asked).json()["choices"]) == 3
    assert [params.seed for params in seen] == [5, 6, 7]


def test_what_clients_send_back_of_an_answer_is_taken(served):
    """Fields that are empty, or for people, or of LiteLLM's own; a thought under each of its names."""
    address, _ = served
    said = {"role": "assistant", "content": "hi", "refusal": None, "annotations": [], "audio": None}
    for more in (
        {"function_call": None, "tool_calls": None, "provider_specific_fields": {"refusal": None}},
        {"name": "ours", "id": "msg_1", "status": "completed", "cache_control": {"type": "ephemeral"}},
        {"reasoning_content": "hm"},
        {"reasoning": "hm"},
        {"thinking": "hm", "thinking_blocks": [{"type": "thinking"}]},
    ):
        asked = {"model": "m", "max_tokens": 2, "messages": [*USER, {**said, **more}, *USER]}
        answered = httpx.post(address + CHAT, json=asked)
        assert answered.status_code == 200, answered.text
