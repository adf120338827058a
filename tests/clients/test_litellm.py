"""litellm against chat completions, responses, completions, and messages (as "anthropic/...")."""

from __future__ import annotations

import os
from typing import Literal

import pytest
from pydantic import BaseModel

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks for a table over the network
litellm = pytest.importorskip("litellm", reason="needs litellm: run `make test-clients`")

USER = [{"role": "user", "content": "hello"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"name": "get_weather", "description": "The weather", "parameters": PARAMETERS}
TOOLS = [{"type": "function", "function": WEATHER}]


class Review(BaseModel):
    """What an answer must fit."""

    mood: Literal["good", "bad"]


@pytest.fixture(params=["openai", "anthropic"])
def ask(address, request):
    base = address if request.param == "anthropic" else f"{address}/v1"
    fixed = {"api_base": base, "api_key": "-", "num_retries": 0}

    def asking(**fields):
        given = {"messages": USER, "max_tokens": 300, **fields}
        return litellm.completion(model=f"{request.param}/{given.pop('name', 'm')}", **fixed, **given)

    return asking


def test_an_answer_comes_whole_and_streamed(ask):
    assert ask().choices[0].message.content == "hello"
    assert ask().usage.completion_tokens == 5
    assert "".join(chunk.choices[0].delta.content or "" for chunk in ask(stream=True)) == "hello"


def test_a_stop_string_and_sampling_are_honoured(ask):
    assert ask(stop=["ll"], temperature=0.5, top_p=0.9).choices[0].message.content == "he"


def test_a_tool_is_called_and_its_result_read(ask):
    message = ask(tools=TOOLS).choices[0].message
    results = [{"role": "tool", "tool_call_id": call.id, "content": "rain"} for call in message.tool_calls]
    found = ask(messages=[*USER, message.model_dump(), *results], tools=TOOLS)
    assert found.choices[0].message.content == "The tool says: rain"


def test_a_call_comes_in_a_stream(ask):
    deltas = [chunk.choices[0].delta for chunk in ask(tools=TOOLS, stream=True)]
    calls = [call for delta in deltas for call in delta.tool_calls or []]
    assert "".join(call.function.name or "" for call in calls) == "get_weather"
    assert "".join(call.function.arguments or "" for call in calls) == '{"city": "Paris"}'


def test_a_call_can_be_required(ask):
    found = ask(tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    assert found.choices[0].message.tool_calls[0].function.name == "get_weather"


def test_an_answer_fits_a_class(ask):
    Review.model_validate_json(ask(response_format=Review).choices[0].message.content)


def test_errors_are_those_that_they_are(ask):
    with pytest.raises(litellm.NotFoundError, match="there is no model"):
        ask(name="none")
    with pytest.raises(litellm.BadRequestError, match="the prompt has 17,"):
        ask(messages=[{"role": "user", "content": "x" * 17_000}])


def test_responses_and_plain_completions(address):
    fixed = {"api_base": f"{address}/v1", "api_key": "-"}
    found = litellm.responses(model="openai/m", input="hello", **fixed)
    assert found.output[0].content[0].text == "hello"
    called = litellm.responses(
        model="openai/m", input="hello", tools=[{"type": "function", **WEATHER}], **fixed
    )
    assert called.output[0].name == "get_weather"
    kinds = [event.type for event in litellm.responses(model="openai/m", input="x", stream=True, **fixed)]
    assert kinds[-1] == "response.completed"
    plain = litellm.text_completion(
        model="text-completion-openai/m", prompt="abc", max_tokens=5, num_retries=0, **fixed
    )
    assert len(plain.choices[0].text) == 5
