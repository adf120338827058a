"""Tools as OpenAI's own client sees them: whole and streamed."""

from __future__ import annotations

import json

import httpx
import openai
import pytest
import tokenizers

from qrun.text.tokenizer import Tokenizer
from tests.fakes import fake_manifest, fake_model, scripted
from tests.serve.serving import serving
from tests.serve.tooling import OSLO, QWEN_TEMPLATE, TIME, USER, WEATHER, call
from tests.tiny import write_tiny_tokenizer


@pytest.fixture(scope="module")
def ask(served_tokenizer):
    """Asks a model that answers with a text of the test's choosing, and knows Qwen's template."""
    manifest = fake_manifest(context_length=4096)

    def asking(text: str, *, stream: bool = False, messages=USER, **fields):
        model = fake_model(
            served_tokenizer,
            scripted(served_tokenizer, [text] * 5),
            manifest=manifest,
            template=QWEN_TEMPLATE,
        )
        with serving({"m": model}) as address:
            client = openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0)
            found = client.chat.completions.create(model="m", messages=messages, stream=stream, **fields)
            return list(found) if stream else found

    return asking


def streamed(chunks) -> tuple[str, list[tuple[int, str, str]], str]:
    text, calls, reason = "", [], None
    for chunk in chunks:
        (choice,) = chunk.choices
        text += choice.delta.content or ""
        for each in choice.delta.tool_calls or []:
            assert each.id.startswith("call_")
            calls.append((each.index, each.function.name, each.function.arguments))
        reason = choice.finish_reason or reason
    return text, calls, reason


PLAIN = '{"name": "get_time", "arguments": {}}'
ANSWERS = {
    "a call": (call("get_weather", OSLO), None, [("get_weather", OSLO)], "tool_calls"),
    "text before it": (
        "I look.\n" + call("get_weather", OSLO),
        "I look.",
        [("get_weather", OSLO)],
        "tool_calls",
    ),
    "two": (
        call("get_weather", OSLO) + "\n" + call("get_time", {}),
        None,
        [("get_weather", OSLO), ("get_time", {})],
        "tool_calls",
    ),
    "no call": ("It rains.", "It rains.", [], "stop"),
    "plain JSON": (PLAIN, PLAIN, [], "stop"),
    "no such tool": (call("rm", {}), call("rm", {}), [], "stop"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_calls_come_whole_and_as_deltas_with_whole_arguments(ask, name):
    said, text, calls, reason = ANSWERS[name]
    (choice,) = ask(said, tools=[WEATHER, TIME]).choices
    assert (choice.message.content, choice.finish_reason) == (text, reason)
    found = [
        (each.function.name, json.loads(each.function.arguments)) for each in choice.message.tool_calls or []
    ]
    assert found == calls
    streamed_text, deltas, streamed_reason = streamed(ask(said, tools=[WEATHER, TIME], stream=True))
    assert (streamed_text, streamed_reason) == (text or "", reason)
    assert [(tool, json.loads(arguments)) for _, tool, arguments in deltas] == calls
    assert [index for index, _, _ in deltas] == list(range(len(calls)))


def test_one_call_where_parallel_ones_are_off(ask):
    said = call("get_time", {}) + "\n" + call("get_time", {})
    (choice,) = ask(said, tools=[TIME], parallel_tool_calls=False).choices
    assert len(choice.message.tool_calls) == 1


def test_none_is_no_tools(ask):
    (choice,) = ask(call("get_time", {}), tools=[TIME], tool_choice="none").choices
    assert (choice.message.content, choice.message.tool_calls) == (call("get_time", {}), None)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_call_is_enforced_against_the_schema_of_its_tool(client, choice, stream):
    """The model says "abcd..." whatever it is asked; its template knows of no tools."""
    for seed in range(4):
        asked = {"model": "long", "messages": USER, "tools": [WEATHER, TIME], "tool_choice": choice}
        sampling = {"temperature": 3, "seed": seed, "max_tokens": 800, "parallel_tool_calls": False}
        found = client.chat.completions.create(**asked, **sampling, stream=stream)
        if stream:
            text, calls, reason = streamed(found)
            ((_, name, arguments),) = calls
        else:
            message, reason = found.choices[0].message, found.choices[0].finish_reason
            text, (one,) = message.content or "", message.tool_calls
            name, arguments = one.function.name, one.function.arguments
        assert (text, reason) == ("", "tool_calls")
        assert name == "get_weather" or choice == "required"
        if name == "get_weather":
            assert json.loads(arguments)["city"] in ("Oslo", "Rome")
            assert json.loads(arguments)["days"] <= 9
        else:
            assert json.loads(arguments) == {}


def test_a_tool_may_have_the_name_of_a_choice(client):
    """A tool named "auto" that had to be called was taken for tool_choice "auto": the answer was free."""
    tools = [TIME, {"type": "function", "function": {"name": "auto"}}]
    asked = {"model": "long", "messages": USER, "tools": tools, "parallel_tool_calls": False}
    choice = {"type": "function", "function": {"name": "auto"}}
    found = client.chat.completions.create(**asked, tool_choice=choice, max_tokens=200)
    (one,) = found.choices[0].message.tool_calls
    assert one.function.name == "auto"


def test_a_length_may_cut_a_call_off(client):
    asked = {"model": "long", "messages": USER, "tools": [TIME], "tool_choice": "required", "max_tokens": 15}
    choice = client.chat.completions.create(**asked).choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.content.startswith("<tool_call>")


def test_results_go_back_through_the_template(served_tokenizer):
    """Arguments are objects there, as the template writes them with tojson."""
    seen = []
    model = fake_model(
        served_tokenizer,
        scripted(served_tokenizer, ["x", "Rain."]),
        manifest=fake_manifest(context_length=4096),
        template=QWEN_TEMPLATE,
    )
    render = model.template.render
    model.template.render = lambda *a, **k: seen.append(render(*a, **k)) or seen[-1]
    called = {"id": "call_1", "type": "function"}
    called["function"] = {"name": "get_weather", "arguments": json.dumps(OSLO)}
    messages = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "rain"}]},
    ]
    with serving({"m": model}) as address:
        asked = {"model": "m", "messages": messages, "tools": [WEATHER]}
        found = httpx.post(f"{address}/v1/chat/completions", json=asked).json()
    assert found["choices"][0]["message"]["content"] == "Rain."
    assert '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo", "days": 1}}' in seen[0]
    assert "<tool_response>\nrain\n</tool_response>" in seen[0]


BAD_CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}
REFUSED = [
    ({"tools": "f"}, "tools"),
    ({"tools": [5]}, "tools[0]"),
    ({"tools": [{"type": "custom"}]}, "tools[0]"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "f", "x": 1}}]}, "tools[0].function.x"),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
        "tools[0].function.parameters",
    ),
    ({"tools": [TIME, TIME]}, "tools"),
    ({"tools": [TIME], "tool_choice": "any"}, "tool_choice"),
    ({"tools": [TIME], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
    ({"tools": [TIME], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"parallel_tool_calls": True}, "parallel_tool_calls"),
    ({"tools": [TIME], "tool_choice": "required", "response_format": {"type": "json_object"}}, "tools"),
    ({"tools": [TIME]}, "tools"),  # "echo" has a template without a place for tools
    (
        {
            "tools": [TIME, {"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}],
            "tool_choice": "required",
        },
        "tools[1].function.parameters",
    ),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]},
        "tools",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [BAD_CALL]}]},
        "messages[0].tool_calls[0].function.arguments",
    ),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [BAD_CALL]}]}, "messages[0].tool_calls"),
    ({"messages": [{"role": "assistant", "tool_calls": [1]}]}, "messages[0].tool_calls[0].function"),
]


@pytest.mark.parametrize(("changes", "field"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_is_wrong_is_named(address, changes, field):
    asked = {"model": "echo", "messages": USER, "max_tokens": 2, **changes}
    response = httpx.post(f"{address}/v1/chat/completions", json=asked)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == field


@pytest.fixture(scope="module")
def tagging(tmp_path_factory):
    """A tokenizer to which the tags are tokens, as to Qwen's."""
    folder = tmp_path_factory.mktemp("tags")
    write_tiny_tokenizer(folder)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens(["<tool_call>", "</tool_call>"])
    return Tokenizer(backend, {})


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_where_the_tags_are_tokens_a_strict_tool_is_enforced_whenever_it_is_called(tagging, choice):
    """The model begins a call after some words, and then would say "xxx" for ever."""
    opening, prefix = tagging.token_id("<tool_call>"), tagging.encode("I look.")
    header = tagging.encode("<|im_start|>assistant\n")
    (x,) = tagging.encode("x")

    def rule(seen: list[int]) -> int:
        start = max(i for i in range(len(seen)) if seen[i : i + len(header)] == header)
        return [*prefix, opening, *[x] * 2000][len(seen) - start - len(header)]

    manifest = fake_manifest(context_length=4096)
    model = fake_model(tagging, rule, manifest=manifest, template=QWEN_TEMPLATE)
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    with serving({"m": model}) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0)
        asked = {"model": "m", "messages": USER, "tools": [strict], "tool_choice": choice}
        found = client.chat.completions.create(**asked, parallel_tool_calls=False, max_tokens=300)
    (choice_made,) = found.choices
    (one,) = choice_made.message.tool_calls
    assert set(json.loads(one.function.arguments)) == {"city", "days"}
    assert choice_made.message.content == ("I look." if choice == "auto" else None)
