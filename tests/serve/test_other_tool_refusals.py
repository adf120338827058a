"""If these fail, a wrong tool on /v1/responses or /v1/messages is taken, or refused without its name."""

from __future__ import annotations

import anthropic
import openai
import pytest

from tests.serve.tooling import CLAUDES, FLAT, USER

FORCED = {"tools": FLAT, "tool_choice": "required"}
CALLED = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "c", "output": "x"}
RESPONSES_REFUSED = [
    ({"tools": "f"}, "tools"),
    ({"tools": [1]}, "tools[0]"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "custom", "name": "f"}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
    ({"tools": [{"type": "function", "name": "f", "defer_loading": True}]}, "tools[0].defer_loading"),
    ({"tools": [{"type": "function", "name": "f", "parameters": []}]}, "tools[0].parameters"),
    ({"tools": [FLAT[0], FLAT[0]]}, "tools"),
    (
        {**FORCED, "tools": [{"type": "function", "name": "f", "parameters": {"not": {}}}]},
        "tools[0].parameters",
    ),
    ({**FORCED, "text": {"format": {"type": "json_object"}}}, "tools"),
    ({"tools": FLAT}, "tools"),  # "echo" has a template without a place for tools
    ({"input": [{**CALLED, "caller": 1}]}, "input[0].caller"),
    ({"input": [CALLED, {**OUTPUT, "is_error": True}]}, "input[1].is_error"),
    ({"input": [{"role": "user", "content": "x", "weight": 1}]}, "input[0].weight"),
    ({"tools": FLAT, "tool_choice": {"type": "function", "name": "f", "mode": "x"}}, "tool_choice.mode"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": FLAT, "tool_choice": "any"}, "tool_choice"),
    ({"tools": FLAT, "tool_choice": {"type": "function", "name": "g"}}, "tool_choice"),
    ({"tools": FLAT, "tool_choice": {"type": "allowed_tools", "mode": "auto"}}, "tool_choice"),
    ({"tools": FLAT, "parallel_tool_calls": "no"}, "parallel_tool_calls"),
    ({"max_tool_calls": 1}, "max_tool_calls"),
    ({"input": [{**CALLED, "arguments": "{"}]}, "input[0].arguments"),
    ({"input": [{**CALLED, "arguments": {}}]}, "input[0].arguments"),
    ({"input": [{**CALLED, "call_id": None}]}, "input[0].call_id"),
    ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input[0].call_id"),
    ({"input": [CALLED, {"type": "function_call_output", "call_id": "c"}]}, "input[1].output"),
    (
        {
            "input": [
                CALLED,
                {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_image"}]},
            ]
        },
        "input[1].output[0]",
    ),
]


@pytest.mark.parametrize(("changes", "field"), RESPONSES_REFUSED, ids=lambda value: str(value)[:60])
def test_what_is_wrong_in_a_response_is_named(client, changes, field):
    with pytest.raises(openai.BadRequestError) as error:
        client.post("/responses", body={"model": "echo", "input": "hi", **changes}, cast_to=object)
    assert error.value.param == field


USED = {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}}]}
MESSAGES_REFUSED = [
    ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, r"tools\[0\].type 'bash_20250124' is not"),
    ({"tools": [{"name": "f"}]}, r"tools\[0\].input_schema must be a JSON schema"),
    ({"tools": [{"name": "f", "parameters": {}}]}, r"tools\[0\].parameters .* called input_schema"),
    ({"tools": [{"name": "a b", "input_schema": {}}]}, r"tools\[0\].name must be"),
    (
        {"tools": [{"name": "f", "input_schema": {}, "input_examples": []}]},
        r"tools\[0\].input_examples is not",
    ),
    ({"tools": [CLAUDES[0], CLAUDES[0]]}, "two of them have the same name"),
    ({"tools": CLAUDES}, "this model's chat template has no place for tools"),
    (
        {"tools": [{"name": "f", "input_schema": {"not": {}}}], "tool_choice": {"type": "any"}},
        r"tools\[0\].input_schema: ",
    ),
    ({"tool_choice": {"type": "any"}}, "tool_choice needs tools"),
    (
        {"tools": CLAUDES, "tool_choice": {"type": "required"}},
        "tool_choice.type must be auto, any, tool or none",
    ),
    ({"tools": CLAUDES, "tool_choice": {"type": "tool"}}, "tool_choice.name must be a string"),
    ({"tools": CLAUDES, "tool_choice": {"type": "tool", "name": "g"}}, "there is no tool 'g'"),
    ({"tools": CLAUDES, "tool_choice": {"type": "any", "name": "g"}}, "tool_choice.name is not supported"),
    (
        {"tools": CLAUDES, "tool_choice": {"type": "auto", "disable_parallel_tool_use": 1}},
        "disable_parallel_tool_use must be true or false",
    ),
    ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking.budget_tokens is not supported"),
    ({"thinking": {"type": "adaptive"}}, "thinking.type must be enabled or disabled, not 'adaptive'"),
    ({"thinking": {}}, "thinking.type must be enabled or disabled"),
    ({"thinking": {"type": "disabled"}}, "thinking: the model's chat template knows no enable_thinking"),
    (
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t"}]}]},
        r"messages\[0\].content\[0\].tool_use_id: no tool_use before it has the id 't'",
    ),
    (
        {
            "messages": [
                USED,
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "is_error": "x"}]},
            ]
        },
        r"messages\[1\].content\[0\].is_error must be true or false",
    ),
    (
        {"messages": [{"role": "user", "content": USED["content"]}]},
        r"messages\[0\].content\[0\] is 'tool_use'",
    ),
    (
        {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f"}]}]},
        r"messages\[0\].content\[0\].input must be an object",
    ),
    (
        {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "name": "f", "input": {}}]}]},
        r"messages\[0\].content\[0\].id must be a string",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        r"messages\[0\].content\[0\] is 'image'",
    ),
    ({"messages": [{"role": "user", "content": "x", "name": "n"}]}, r"messages\[0\].name is not supported"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "weight": 1}]}]},
        r"messages\[0\].content\[0\].weight is not supported",
    ),
    (
        {"messages": [{"role": "assistant", "content": [{**USED["content"][0], "weight": 1}]}]},
        r"messages\[0\].content\[0\].weight is not supported",
    ),
    (
        {
            "messages": [
                USED,
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "weight": 1}]},
            ]
        },
        r"messages\[1\].content\[0\].weight is not supported",
    ),
    ({"messages": []}, "messages is empty"),
]


@pytest.mark.parametrize(("changes", "match"), MESSAGES_REFUSED, ids=lambda value: str(value)[:60])
def test_what_is_wrong_in_a_message_is_named(address, changes, match):
    body = {"model": "echo", "max_tokens": 5, "messages": USER, **changes}
    claude = anthropic.Anthropic(base_url=address, api_key="-", max_retries=0)
    with claude, pytest.raises(anthropic.BadRequestError, match=match):
        claude.post("/v1/messages", body=body, cast_to=object)
