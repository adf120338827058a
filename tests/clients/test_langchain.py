"""langchain-openai against chat completions, responses and completions."""

from __future__ import annotations

import asyncio
from typing import Literal

import pytest
from pydantic import BaseModel

pytest.importorskip("langchain_openai", reason="needs langchain-openai: run `make test-clients`")

from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI


class Review(BaseModel):
    """What an answer must fit; its texts are bounded, since this model would not end them."""

    mood: Literal["good", "bad"]
    stars: Literal[1, 2, 3]


@tool
def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"rain in {city}"


@pytest.fixture(params=["chat completions", "responses"])
def model(address, request):
    return ChatOpenAI(
        model="m",
        base_url=f"{address}/v1",
        api_key="-",
        max_retries=0,
        use_responses_api=request.param == "responses",
    )


def test_an_answer_comes_whole_streamed_and_in_batches(model):
    assert model.invoke("hello").text == "hello"
    chunks = list(model.stream("hello"))
    assert "".join(chunk.text for chunk in chunks) == "hello"
    assert [found.text for found in model.batch(["a", "b", "c"])] == ["a", "b", "c"]


def test_usage_is_reported(model):
    found: AIMessage = model.invoke("hello")
    assert found.usage_metadata["output_tokens"] == 5


def test_a_tool_is_called_and_its_result_read(model):
    able = model.bind_tools([get_weather])
    messages: list = [HumanMessage("How is it?")]
    asked = able.invoke(messages)
    messages += [asked, *(get_weather.invoke(call) for call in asked.tool_calls)]
    assert able.invoke(messages).text == "The tool says: rain in Paris"


def test_a_call_comes_in_a_stream(model):
    whole = None
    for chunk in model.bind_tools([get_weather]).stream("How is it?"):
        whole = chunk if whole is None else whole + chunk
    (call,) = whole.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Paris"})


def test_a_call_can_be_required(model):
    (call, *_) = model.bind_tools([get_weather], tool_choice="get_weather").invoke("hello").tool_calls
    assert call["name"] == "get_weather"


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_an_answer_fits_a_class(model, method):
    found = model.with_structured_output(Review, method=method).invoke("It was cold.")
    assert isinstance(found, Review)


def test_an_unknown_model_is_an_error_with_the_names_that_there_are(address):
    absent = ChatOpenAI(model="none", base_url=f"{address}/v1", api_key="-", max_retries=0)
    with pytest.raises(Exception, match="there is no model 'none'; there are: m"):
        absent.invoke("hello")


def test_an_answer_comes_in_an_event_loop(address):
    """One loop for all: langchain keeps a client for as long as the process lives."""
    model = ChatOpenAI(model="m", base_url=f"{address}/v1", api_key="-", max_retries=0)

    async def both() -> tuple[str, str]:
        chunks = [chunk.text async for chunk in model.astream("hello")]
        return (await model.ainvoke("later")).text, "".join(chunks)

    assert asyncio.run(both()) == ("later", "hello")


def test_a_plain_completion(address):
    plain = OpenAI(model="m", base_url=f"{address}/v1", api_key="-", max_retries=0, max_tokens=5)
    assert len(plain.invoke("abc")) == 5
