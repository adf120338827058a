"""The sample model over HTTP: a real tokenizer, whose tokens are many letters long, under a form."""

from __future__ import annotations

import json

import openai
import pytest

from tests.serve.serving import serve_process

WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["C", "F"]}},
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
}
pytestmark = pytest.mark.timeout(900)  # an export of the sample takes minutes on a busy machine

USER = [{"role": "user", "content": "How is the weather in Paris?"}]


@pytest.fixture(scope="module")
def client(sample_checkpoint, tmp_path_factory):
    from qconvert.export import ExportOptions, export
    from qconvert.progress import Progress

    folder = tmp_path_factory.mktemp("served")
    # As it is: the quickest export, and nothing here depends on its precision.
    options = ExportOptions(precision="int8", output=folder / "sample", verify=False)
    export(str(sample_checkpoint), options, Progress(quiet=True))
    with serve_process(["--engine", str(folder / "sample")], folder / "log") as (_, address):
        yield openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_required_call_is_one_of_the_tool(client, stream):
    asked = {"model": "sample", "messages": USER, "tools": [{"type": "function", "function": WEATHER}]}
    asked |= {"tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 120, "stream": stream}
    found = client.chat.completions.create(**asked)
    if stream:
        choices = [chunk.choices[0] for chunk in found]
        (call,) = [each for choice in choices for each in choice.delta.tool_calls or []]
        reason = choices[-1].finish_reason
    else:
        (call,), reason = found.choices[0].message.tool_calls, found.choices[0].finish_reason
    assert (call.function.name, reason) == ("get_weather", "tool_calls")
    arguments = json.loads(call.function.arguments)
    assert set(arguments) == {"city", "unit"}
    assert "Paris" in arguments["city"]


def test_an_answer_fits_its_schema(client):
    schema = WEATHER["parameters"]
    form = {"type": "json_schema", "json_schema": {"name": "weather", "schema": schema, "strict": True}}
    for temperature in (0, 1.5):
        found = client.chat.completions.create(
            model="sample",
            messages=USER,
            response_format=form,
            temperature=temperature,
            seed=1,
            max_tokens=99,
        )
        assert found.choices[0].finish_reason == "stop"
        assert set(json.loads(found.choices[0].message.content)) == {"city", "unit"}
