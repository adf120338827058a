"""What a server must refuse: one status and one message each, over a real socket."""

from __future__ import annotations

import json

import httpx
import pytest

from tests.fakes import fake_model, repeating
from tests.serve.serving import KEY, serving

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
GOOD = {"model": "echo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
PLAIN = {"model": "base", "prompt": "hi", "max_tokens": 2}

TOOL = {"type": "function", "function": {"name": "f"}}
NAMED = {"type": "function", "function": {"name": "f"}}

# (path, changes to a good request, status, field)
FIELDS = [
    (CHAT, {"model": None}, 400, "model"),
    (CHAT, {"model": 7}, 400, "model"),
    (CHAT, {"model": "none"}, 404, "model"),
    (CHAT, {"messages": None}, 400, "messages"),
    (CHAT, {"messages": "hi"}, 400, "messages"),
    (CHAT, {"messages": {}}, 400, "messages"),
    (CHAT, {"messages": []}, 400, "messages"),
    (CHAT, {"messages": ["hi"]}, 400, "messages[0]"),
    (CHAT, {"messages": [{}]}, 400, "messages[0].role"),
    (CHAT, {"messages": [{"role": 1, "content": "hi"}]}, 400, "messages[0].role"),
    # Qwen's template leaves these messages out, in silence.
    (CHAT, {"messages": [{"role": "wizard", "content": "hi"}]}, 400, "messages[0].role"),
    (CHAT, {"messages": [{"role": "", "content": "hi"}]}, 400, "messages[0].role"),
    (CHAT, {"messages": [{"role": "function", "name": "f", "content": "hi"}]}, 400, "messages[0].role"),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "messages[0].content"),
    (CHAT, {"messages": [{"role": "tool", "tool_call_id": "1"}]}, 400, "messages[0].content"),
    (CHAT, {"messages": [{"role": "assistant", "content": None}]}, 400, "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, 400, "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": {"a": 1}}]}, 400, "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": ["hi"]}]}, 400, "messages[0].content[0]"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        400,
        "messages[0].content[0]",
    ),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400, "messages[0].content[0]"),
    # Within a field, too, nothing is ignored in silence.
    (CHAT, {"messages": [{"role": "user", "content": "hi", "weight": 1}]}, 400, "messages[0].weight"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi", "detail": "low"}]}]},
        400,
        "messages[0].content[0].detail",
    ),
    (CHAT, {"tools": [{**TOOL, "strict": True}]}, 400, "tools[0].strict"),
    (CHAT, {"tools": [TOOL], "tool_choice": {**NAMED, "mode": "x"}}, 400, "tool_choice.mode"),
    ("/apply-template", {"messages": [{"role": "user", "content": "hi", "x": 1}]}, 400, "messages[0].x"),
    (CHAT, {"temperature": "hot"}, 400, "temperature"),
    (CHAT, {"temperature": -1}, 400, "temperature"),
    (CHAT, {"temperature": True}, 400, "temperature"),
    (CHAT, {"top_p": 2}, 400, "top_p"),
    (CHAT, {"top_p": []}, 400, "top_p"),
    (CHAT, {"top_k": -5}, 400, "top_k"),
    (CHAT, {"top_k": 1.5}, 400, "top_k"),
    (CHAT, {"min_p": 2}, 400, "min_p"),
    (CHAT, {"repetition_penalty": 0}, 400, "repetition_penalty"),
    (CHAT, {"presence_penalty": 3}, 400, "presence_penalty"),
    (CHAT, {"frequency_penalty": -3}, 400, "frequency_penalty"),
    (CHAT, {"seed": "x"}, 400, "seed"),
    (CHAT, {"seed": 1.5}, 400, "seed"),
    (CHAT, {"stop": 5}, 400, "stop"),
    (CHAT, {"stop": [""]}, 400, "stop"),
    (CHAT, {"stop": [1]}, 400, "stop[0]"),
    # Each token is compared with all of them: 100,000 took 0.2 s of everybody's time.
    (CHAT, {"stop": [str(number) for number in range(65)]}, 400, "stop"),
    (CHAT, {"stop": "x" * 8193}, 400, "stop"),
    (CHAT, {"n": 0}, 400, "n"),
    (CHAT, {"n": 17}, 400, "n"),
    (CHAT, {"n": "2"}, 400, "n"),
    (CHAT, {"max_tokens": 0}, 400, "max_tokens"),
    (CHAT, {"max_tokens": -1}, 400, "max_tokens"),
    (CHAT, {"max_tokens": 1.5}, 400, "max_tokens"),
    (CHAT, {"max_tokens": 5, "max_completion_tokens": 5}, 400, "max_tokens"),
    (CHAT, {"logit_bias": {"x": 1}}, 400, "logit_bias"),
    (CHAT, {"logit_bias": {"5": 200}}, 400, "logit_bias"),
    (CHAT, {"logit_bias": [1]}, 400, "logit_bias"),
    # The first was a fault in the engine's thread that ended all answers; the others were ignored.
    (CHAT, {"logit_bias": {"1" * 30: 1}}, 400, "logit_bias"),
    (CHAT, {"logit_bias": {"999999": 1}}, 400, "logit_bias"),
    (CHAT, {"logit_bias": {"\u0663": 1}}, 400, "logit_bias"),
    (CHAT, {"logit_bias": {str(number): 1 for number in range(5_000)}}, 400, "logit_bias"),
    (CHAT, {"logprobs": 2}, 400, "logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, 400, "logprobs"),
    (CHAT, {"top_logprobs": 2}, 400, "top_logprobs"),
    (CHAT, {"stream": "yes"}, 400, "stream"),
    (CHAT, {"stream_options": {"include_usage": True}}, 400, "stream_options"),
    (CHAT, {"stream": True, "stream_options": {"more": 1}}, 400, "stream_options.more"),
    (CHAT, {"response_format": {"type": "xml"}}, 400, "response_format"),
    (CHAT, {"response_format": "json"}, 400, "response_format"),
    (CHAT, {"ignore_eos": 1}, 400, "ignore_eos"),
    (CHAT, {"temprature": 1}, 400, "temprature"),
    (CHAT, {"audio": {}}, 400, "audio"),
    (TEXT, {"prompt": None}, 400, "prompt"),
    (TEXT, {"prompt": 5}, 400, "prompt"),
    (TEXT, {"prompt": []}, 400, "prompt"),
    (TEXT, {"prompt": ["x"] * 69}, 400, "prompt"),  # 4 slots and 64 places in the queue
    (TEXT, {"prompt": [1, "x"]}, 400, "prompt"),
    (TEXT, {"prompt": [99999]}, 400, "prompt"),
    (TEXT, {"prompt": [-1]}, 400, "prompt"),
    (TEXT, {"prompt": [10**30], "echo": True}, 400, "prompt"),
    (TEXT, {"prompt": ""}, 400, None),
    (TEXT, {"suffix": "x"}, 400, "suffix"),
    (TEXT, {"best_of": 3}, 400, "best_of"),
    (TEXT, {"max_tokens": -1}, 400, "max_tokens"),
    (TEXT, {"prompt": ["x", 1]}, 400, "prompt"),
    (TEXT, {"prompt": [[]]}, 400, None),
    (TEXT, {"echo": 1}, 400, "echo"),
    (TEXT, {"echo": True, "logprobs": -1}, 400, "logprobs"),
    (TEXT, {"logprobs": 21}, 400, "logprobs"),
    ("/tokenize", {"content": 5}, 400, "content"),
    ("/detokenize", {"tokens": ["x"]}, 400, "tokens[0]"),
    ("/detokenize", {"tokens": [99999]}, 400, "tokens"),  # it was left out of the text
    ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
    ("/apply-template", {"messages": []}, 400, "messages"),
    ("/apply-template", {"messages": GOOD["messages"], "model": "base"}, 400, None),
    (CHAT, {"model": "base"}, 400, None),
    (CHAT, {"messages": [{"role": "user", "content": None}, 7]}, 400, "messages[1]"),
    (CHAT, {"regex": "("}, 400, "regex"),
    (CHAT, {"regex": 5}, 400, "regex"),
    (CHAT, {"grammar": "start: nothing"}, 400, "grammar"),
    (CHAT, {"regex": "a", "grammar": 'start: "a"'}, 400, "grammar"),
    (CHAT, {"response_format": {"type": "json_schema"}}, 400, "response_format"),
    (CHAT, {"regex": "a+", "ignore_eos": True}, 400, "ignore_eos"),
    (CHAT, {"functions": []}, 400, "functions"),
    ("/tokenize", {"content": "x", "prompt": "x"}, 400, "prompt"),
    ("/detokenize", {"tokens": "x"}, 400, "tokens"),
    ("/apply-template", {"messages": [{"content": "x"}]}, 400, "messages[0].role"),
    ("/apply-template", {"messages": [{"role": "wizard", "content": "x"}]}, 400, "messages[0].role"),
]


@pytest.mark.parametrize(("path", "changes", "status", "field"), FIELDS, ids=lambda value: str(value)[:60])
def test_a_bad_field_is_named(address, path, changes, status, field):
    base = {CHAT: GOOD, TEXT: PLAIN}.get(path, {"model": "echo"})
    response = httpx.post(address + path, json={**base, **changes})
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["param"] == field
    assert error["message"]
    assert error["type"] in ("invalid_request_error", "not_found_error")


# For a good request to /v1/messages, whose errors have no place for the field: the message begins with it.
CLAUDES = [
    ({"model": None}, "model: expected"),
    ({"model": "none"}, "there is no model 'none'"),
    ({"max_tokens": None}, "max_tokens: expected"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens: expected"),
    ({"messages": "hi"}, "messages: expected"),
    ({"messages": ["hi"]}, "messages[0]: expected"),
    ({"messages": [{}]}, "messages[0].role must be"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role must be"),
    ({"messages": [{"role": "user"}]}, "messages[0].content must be"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content must be"),
    ({"messages": [{"role": "user", "content": ["hi"]}]}, "messages[0].content[0] is"),
    ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "messages[0].content[0] is"),
    ({"system": 5}, "system: expected"),
    ({"system": [{"type": "image"}]}, "system[0] is"),
    ({"stream": "yes"}, "stream: expected"),
    ({"temperature": "hot"}, "temperature: expected"),
    ({"temperature": -1}, "temperature"),
    ({"top_p": 2}, "top_p"),
    ({"top_k": -5}, "top_k"),
    ({"stop_sequences": "x"}, "stop_sequences: expected"),
    ({"stop_sequences": [""]}, "stop"),
    ({"stop_sequences": [str(number) for number in range(65)]}, "stop_sequences must be at most 64"),
    ({"tools": {}}, "tools: expected"),
    ({"tool_choice": "auto"}, "tool_choice: expected"),
    ({"container": "x"}, "container is not supported here"),
    ({"mcp_servers": []}, "mcp_servers is not supported here"),
]


@pytest.mark.parametrize(("changes", "message"), CLAUDES, ids=lambda value: str(value)[:60])
def test_a_bad_field_of_the_messages_api_is_named(address, changes, message):
    response = httpx.post(f"{address}/v1/messages", json={**GOOD, **changes})
    assert response.status_code == (404 if "there is no model" in message else 400)
    assert response.json()["error"]["message"].startswith(message)


# For a good request to /v1/responses.
RESPONSES = [
    ({"model": 7}, "model"),
    ({"input": None}, "input"),
    ({"input": 5}, "input"),
    ({"input": ["hi"]}, "input[0]"),
    ({"input": [{"role": 1, "content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "wizard", "content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": [{"role": "user", "content": 5}]}, "input[0].content"),
    ({"input": [{"type": "reasoning", "summary": []}]}, "input[0].type"),
    ({"instructions": 5}, "instructions"),
    ({"max_output_tokens": -1}, "max_output_tokens"),
    ({"max_output_tokens": "many"}, "max_output_tokens"),
    ({"stream": 1}, "stream"),
    ({"temperature": -1}, "temperature"),
    ({"top_p": -1}, "top_p"),
    ({"text": "json"}, "text"),
    ({"conversation": "c"}, "conversation"),
    ({"include": []}, "include"),
    ({"prompt": {"id": "p"}}, "prompt"),
]


@pytest.mark.parametrize(("changes", "field"), RESPONSES, ids=lambda value: str(value)[:60])
def test_a_bad_field_of_the_responses_api_is_named(address, changes, field):
    response = httpx.post(f"{address}/v1/responses", json={"model": "echo", "input": "hi", **changes})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == field


MISSING = [
    (CHAT, {"messages": GOOD["messages"]}, "model"),
    (CHAT, {"model": "echo"}, "messages"),
    (TEXT, {"model": "base"}, "prompt"),
    ("/v1/responses", {"model": "echo"}, "input"),
    ("/v1/messages", {"model": "echo", "max_tokens": 2}, "messages"),
    ("/v1/messages", {"model": "echo", "messages": GOOD["messages"]}, "max_tokens"),
    ("/v1/messages/count_tokens", {"model": "echo"}, "messages"),
    ("/tokenize", {"model": "echo"}, "content"),
    ("/detokenize", {"model": "echo"}, "tokens"),
    ("/apply-template", {"model": "echo"}, "messages"),
    ("/tokenize", {"content": "x"}, "model"),  # there are several, so none is meant by itself
]


@pytest.mark.parametrize(("path", "body", "missing"), MISSING)
def test_what_is_missing_is_named(address, path, body, missing):
    response = httpx.post(address + path, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["message"] == f"{missing} is missing"


def test_a_good_request_is_not_refused(address):
    """Otherwise the table above would show nothing."""
    assert httpx.post(address + CHAT, json=GOOD).status_code == 200
    assert httpx.post(address + TEXT, json=PLAIN).status_code == 200
    harmless = {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"}
    assert httpx.post(address + CHAT, json={**GOOD, **harmless}).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/v1", 404),
        ("POST", "/v1/chat/completions/", 307),
        ("GET", CHAT, 405),
        ("DELETE", CHAT, 405),
        ("POST", "/v1/models", 405),
        ("GET", "/v1/models/none", 404),
        ("GET", "/v1/models/../../etc/passwd", 404),
        ("PATCH", "/health", 405),
    ],
)
def test_unknown_routes_and_methods(address, method, path, status):
    assert httpx.request(method, address + path, follow_redirects=False).status_code == status


def test_a_large_body_is_refused_before_it_is_read(served_tokenizer):
    with serving(
        {"m": fake_model(served_tokenizer, repeating(served_tokenizer, "x"))}, most_bytes=1000
    ) as address:
        response = httpx.post(address + CHAT, content=b"x" * 1001)
        assert response.status_code == 413
        assert "larger than 1,000 bytes" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "given", [None, "", "Bearer", "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x", "Bearer \xe9"]
)
def test_without_a_right_key_nobody_is_answered(served_tokenizer, given):
    models = {"m": fake_model(served_tokenizer, repeating(served_tokenizer, "x"))}
    with serving(models, keys=("other", KEY)) as address:
        headers = {} if given is None else {"Authorization": given.encode("latin-1")}
        response = httpx.post(address + CHAT, json={**GOOD, "model": "m"}, headers=headers)
        assert response.status_code == 401
        assert KEY not in response.text
        assert httpx.get(f"{address}/health").status_code == 200
        right = {"Authorization": f"Bearer {KEY}"}
        assert httpx.post(address + CHAT, json={**GOOD, "model": "m"}, headers=right).status_code == 200


def test_errors_are_json_even_for_unicode_that_is_none(address):
    body = json.dumps({**GOOD, "messages": [{"role": "user", "content": "\ud800"}]})
    response = httpx.post(address + CHAT, content=body.encode())
    assert response.status_code == 400
