"""Tools on /v1/responses through OpenAI's client, and on /v1/messages through Anthropic's."""

from __future__ import annotations

import json
from contextlib import contextmanager

import anthropic
import openai
import pytest

from tests.fakes import fake_manifest, fake_model, scripted
from tests.serve.serving import serving
from tests.serve.tooling import CLAUDES, FLAT, OSLO, QWEN_TEMPLATE, USER, call

TWO = "I look.\n" + call("get_weather", OSLO) + "\n" + call("get_time", {})


@pytest.fixture(scope="module")
def saying(served_tokenizer):
    """A model that gives these answers, its template Qwen's, and the prompts that it was given."""

    @contextmanager
    def found(*answers: str):
        rule = scripted(served_tokenizer, [*answers] * 5)
        manifest = fake_manifest(context_length=4096)
        model = fake_model(served_tokenizer, rule, manifest=manifest, template=QWEN_TEMPLATE)
        prompts, render = [], model.template.render
        model.template.render = lambda *a, **k: prompts.append(render(*a, **k)) or prompts[-1]
        with serving({"m": model}) as address:
            yield (
                openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0),
                anthropic.Anthropic(base_url=address, api_key="-", max_retries=0),
                prompts,
            )

    return found


def test_a_response_has_an_item_for_each_text_and_call(saying):
    with saying(TWO) as (client, _, prompts):
        found = client.responses.create(model="m", input="Oslo?", tools=FLAT)
    assert [item.type for item in found.output] == ["message", "function_call", "function_call"]
    assert (found.output_text, found.status) == ("I look.", "completed")
    calls = [(item.name, json.loads(item.arguments)) for item in found.output[1:]]
    assert calls == [("get_weather", OSLO), ("get_time", {})]
    assert len({item.call_id for item in found.output[1:]}) == 2
    assert '"name": "get_weather"' in prompts[0], "the template tells the model of its tools"
    assert (found.tool_choice, found.parallel_tool_calls) == ("auto", True)
    assert [tool.name for tool in found.tools] == ["get_weather", "get_time"]


def test_a_response_streams_calls_in_the_originals_order(saying):
    with saying(TWO) as (client, _, _), client.responses.stream(model="m", input="x", tools=FLAT) as stream:
        events = list(stream)
        final = stream.get_final_response()
    kinds = [event.type.removeprefix("response.") for event in events]
    one = ["function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]
    assert [kind for kind in kinds if kind != "output_text.delta"] == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *("output_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", *one) * 2,
        "completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    added = [event.item for event in events if event.type == "response.output_item.added"]
    assert [item.status for item in added] == ["in_progress"] * 3
    done = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert [(event.output_index, event.name, json.loads(event.arguments)) for event in done] == [
        (1, "get_weather", OSLO),
        (2, "get_time", {}),
    ]
    assert [item.id for item in added] == [item.id for item in final.output]


def test_results_go_back_into_a_response(saying):
    with saying("x", "Rain.") as (client, _, prompts):
        first = client.responses.create(model="m", input="x")
        conversation = [
            {"role": "user", "content": "Oslo?"},
            {"role": "assistant", "content": first.output_text},
            {
                "type": "function_call",
                "call_id": "c1",
                "name": "get_weather",
                "arguments": json.dumps(OSLO),
            },
            {"type": "function_call", "call_id": "c2", "name": "get_time", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "rain"},
            {
                "type": "function_call_output",
                "call_id": "c2",
                "output": [{"type": "input_text", "text": "noon"}],
            },
        ]
        found = client.responses.create(model="m", input=conversation, tools=FLAT)
    assert found.output_text == "Rain."
    said = '{"name": "get_weather", "arguments": {"city": "Oslo", "days": 1}}'
    assert f"<|im_start|>assistant\nx\n<tool_call>\n{said}\n</tool_call>\n<tool_call>\n" in prompts[-1]
    assert "<tool_response>\nrain\n</tool_response>\n<tool_response>\nnoon\n</tool_response>" in prompts[-1]


def test_what_a_response_said_can_be_sent_back_as_it_is(saying):
    """As OpenAI's guide does it: the items of the output, and then the result."""
    with saying(call("get_time", {}), "Noon.") as (client, _, _):
        given = [{"role": "user", "content": "When?"}]
        first = client.responses.create(model="m", input=given, tools=FLAT)
        (item,) = first.output
        given += first.output
        given.append({"type": "function_call_output", "call_id": item.call_id, "output": "12:00"})
        assert client.responses.create(model="m", input=given, tools=FLAT).output_text == "Noon."


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_weather"}])
def test_a_call_in_a_response_is_enforced(client, choice):
    """The model says "abcd..." whatever it is asked."""
    asked = {"model": "long", "input": "hi", "tools": FLAT, "tool_choice": choice, "temperature": 2}
    found = client.responses.create(**asked, parallel_tool_calls=False, max_output_tokens=900)
    (item,) = found.output
    assert item.type == "function_call"
    if choice != "required":
        assert item.name == "get_weather"
        assert json.loads(item.arguments)["city"] in ("Oslo", "Rome")


def test_none_and_single_calls_in_a_response(saying):
    with saying(TWO) as (client, _, prompts):
        asked = {"model": "m", "input": "x", "tools": FLAT}
        assert client.responses.create(**asked, tool_choice="none").output_text == TWO
        assert "get_weather" not in prompts[0]
        one = client.responses.create(**asked, parallel_tool_calls=False)
        assert [item.type for item in one.output] == ["message", "function_call"]


def test_a_message_has_a_block_for_each_text_and_call(saying):
    with saying(TWO) as (_, claude, prompts):
        found = claude.messages.create(model="m", max_tokens=500, messages=USER, tools=CLAUDES)
        counted = claude.messages.count_tokens(model="m", messages=USER, tools=CLAUDES)
    assert [block.type for block in found.content] == ["text", "tool_use", "tool_use"]
    assert found.content[0].text == "I look."
    assert [(block.name, block.input) for block in found.content[1:]] == [
        ("get_weather", OSLO),
        ("get_time", {}),
    ]
    assert found.stop_reason == "tool_use"
    assert all(block.id.startswith("toolu_") for block in found.content[1:])
    assert counted.input_tokens == found.usage.input_tokens
    assert '"name": "get_weather"' in prompts[0]


def test_a_message_streams_calls_in_the_originals_order(saying):
    asked = {"model": "m", "max_tokens": 500, "messages": USER, "tools": CLAUDES}
    with saying(TWO) as (_, claude, _):
        with claude.messages.stream(**asked) as stream:
            final = stream.get_final_message()
        events = list(claude.messages.create(**asked, stream=True))
    assert [(block.name, block.input) for block in final.content[1:]] == [
        ("get_weather", OSLO),
        ("get_time", {}),
    ]
    kinds = [
        event.delta.type if event.type == "content_block_delta" else event.type
        for event in events
        if event.type != "ping"
    ]
    one = ["content_block_start", "input_json_delta", "input_json_delta", "content_block_stop"]
    assert [kind for kind in kinds if kind != "text_delta"] == [
        *("message_start", "content_block_start", "content_block_stop"),
        *one * 2,
        *("message_delta", "message_stop"),
    ]
    starts = [event.content_block for event in events if event.type == "content_block_start"]
    assert [block.type for block in starts] == ["text", "tool_use", "tool_use"]
    assert [block.input for block in starts[1:]] == [{}, {}]
    assert [event.index for event in events if event.type == "content_block_stop"] == [0, 1, 2]
    assert next(event.delta.stop_reason for event in events if event.type == "message_delta") == "tool_use"


def test_results_go_back_into_a_message(saying):
    """As Anthropic's guide does it: the content of the answer, and then the results in a user's message."""
    with saying(TWO, "Rain.") as (_, claude, prompts):
        first = claude.messages.create(model="m", max_tokens=500, messages=USER, tools=CLAUDES)
        weather, clock = first.content[1:]
        results = [
            {"type": "tool_result", "tool_use_id": weather.id, "content": [{"type": "text", "text": "rain"}]},
            {"type": "tool_result", "tool_use_id": clock.id, "content": "no clock", "is_error": True},
            {"type": "text", "text": "Well?"},
        ]
        messages = [
            *USER,
            {"role": "assistant", "content": first.content},
            {"role": "user", "content": results},
        ]
        found = claude.messages.create(model="m", max_tokens=500, messages=messages, tools=CLAUDES)
    assert found.content[0].text == "Rain."
    responses = "<tool_response>\nrain\n</tool_response>\n<tool_response>\nError: no clock\n</tool_response>"
    assert responses in prompts[-1]
    assert prompts[-1].endswith("<|im_start|>user\nWell?<|im_end|>\n<|im_start|>assistant\n")
    assert '{"name": "get_weather", "arguments": {"city": "Oslo", "days": 1}}' in prompts[-1]


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
def test_a_call_in_a_message_is_enforced(address, choice):
    with anthropic.Anthropic(base_url=address, api_key="-", max_retries=0) as claude:
        found = claude.messages.create(
            model="long",
            max_tokens=900,
            messages=USER,
            tools=CLAUDES,
            extra_body={"temperature": 1},
            tool_choice={**choice, "disable_parallel_tool_use": True},
        )
    (block,) = found.content
    assert (block.type, found.stop_reason) == ("tool_use", "tool_use")
    if "name" in choice:
        assert block.name == "get_weather"
        assert block.input["city"] in ("Oslo", "Rome")


def test_none_and_single_calls_in_a_message(saying):
    with saying(TWO) as (_, claude, prompts):
        asked = {"model": "m", "max_tokens": 500, "messages": USER, "tools": CLAUDES}
        found = claude.messages.create(**asked, tool_choice={"type": "none"})
        assert (found.content[0].text, found.stop_reason) == (TWO, "end_turn")
        assert "get_weather" not in prompts[0]
        alone = {"type": "auto", "disable_parallel_tool_use": True}
        one = claude.messages.create(**asked, tool_choice=alone)
        assert [block.type for block in one.content] == ["text", "tool_use"]
