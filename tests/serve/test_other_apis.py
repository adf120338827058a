"""The Responses API through OpenAI's client, the Messages API through Anthropic's, and the metrics."""

from __future__ import annotations

import json
import re

import anthropic
import httpx
import openai
import pytest

from tests.fakes import fake_model, repeating
from tests.serve.serving import KEY, serving

USER = [{"role": "user", "content": "hello"}]


@pytest.fixture
def claude(address):
    with anthropic.Anthropic(base_url=address, api_key="unused", max_retries=0) as found:
        yield found


def test_a_response_is_answered_whole(client):
    found = client.responses.create(model="echo", input="hello")
    assert (found.output_text, found.status, found.object) == ("hello", "completed", "response")
    assert found.usage.output_tokens == 5
    assert found.usage.total_tokens == found.usage.input_tokens + 5


def test_a_response_takes_messages_and_instructions(client):
    given = [{"role": "user", "content": [{"type": "input_text", "text": "one two"}]}]
    found = client.responses.create(model="echo", input=given, instructions="be brief")
    assert found.output_text == "one two"
    before = [{**item.model_dump(), "phase": "final_answer"} for item in found.output]  # as OpenAI's own
    again = [*given, *before, {"role": "user", "content": "three"}]
    assert client.responses.create(model="echo", input=again).output_text == "three"


def test_a_response_that_is_cut_off_is_incomplete(client):
    found = client.responses.create(model="long", input="hi", max_output_tokens=4)
    assert (found.status, found.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert len(found.output_text) == 4


def test_a_response_fits_its_schema(client):
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    form = {"type": "json_schema", "name": "x", "schema": schema, "strict": True}
    found = client.responses.create(model="long", input="hi", text={"format": form}, max_output_tokens=200)
    assert json.loads(found.output_text)["a"] in ("x", "y")
    assert found.text.format.type == "json_schema"


def test_a_response_is_streamed_in_the_originals_order(client):
    events = list(client.responses.create(model="echo", input="hello", stream=True))
    kinds = [event.type for event in events]
    assert [kind for kind in kinds if "delta" not in kind] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert "".join(event.delta for event in events if "delta" in event.type) == "hello"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].response.output_text == "hello"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"reasoning": {"effort": "low"}}, "reasoning.effort"),
        ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
        ({"reasoning": {"effort": "none"}}, "reasoning.effort"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"truncation": "auto"}, "truncation"),
        ({"text": {"format": {"type": "xml"}}}, "text.format"),
        ({"text": {"format": "json"}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"temperature": "hot"}, "temperature"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_a_response_cannot_be_asked_is_named(client, changes, field):
    with pytest.raises(openai.BadRequestError) as error:
        client.post("/responses", body={"model": "echo", "input": "hi", **changes}, cast_to=object)
    assert error.value.param == field


def test_a_message_is_answered_whole(claude):
    found = claude.messages.create(model="echo", max_tokens=20, messages=USER, system="be brief")
    assert (found.content[0].text, found.stop_reason, found.role) == ("hello", "end_turn", "assistant")
    assert found.usage.output_tokens == 5
    asked = claude.messages.count_tokens(model="echo", messages=USER, system="be brief")
    assert asked.input_tokens == found.usage.input_tokens


@pytest.mark.parametrize("content", ["", [], [{"type": "text", "text": ""}]])
def test_a_message_of_nothing_is_still_a_message(claude, content):
    """A message of empty parts was left out, and the conversation was another one."""
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "what?"}]
    asked = {"model": "echo", "max_tokens": 9, "messages": [*turns, {"role": "user", "content": "hello"}]}
    empty = {**asked, "messages": [{"role": "user", "content": ""}, *asked["messages"][1:]]}
    counts = [
        claude.messages.count_tokens(model="echo", messages=each["messages"]) for each in (asked, empty)
    ]
    assert counts[0].input_tokens == counts[1].input_tokens


def test_a_message_says_which_stop_sequence_has_ended_it(claude):
    found = claude.messages.create(model="long", max_tokens=50, messages=USER, stop_sequences=["zz", "gh"])
    assert (found.stop_reason, found.stop_sequence) == ("stop_sequence", "gh")
    cut = claude.messages.create(model="long", max_tokens=3, messages=USER)
    assert (cut.stop_reason, cut.stop_sequence, len(cut.content[0].text)) == ("max_tokens", None, 3)


def test_a_message_is_streamed_in_the_originals_order(claude, address):
    with claude.messages.stream(model="echo", max_tokens=20, messages=USER) as stream:
        assert "".join(stream.text_stream) == "hello"
        assert stream.get_final_message().usage.output_tokens == 5
    asked = {"model": "echo", "max_tokens": 20, "messages": USER, "stream": True}
    with httpx.stream("POST", f"{address}/v1/messages", json=asked) as response:
        lines = [line for line in response.iter_lines() if line]
    names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    kinds = [json.loads(line.removeprefix("data: "))["type"] for line in lines if line.startswith("data: ")]
    assert names == kinds
    assert [name for name in names if name != "content_block_delta"] == [
        "message_start",
        "content_block_start",
        "ping",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]


def test_messages_are_refused_in_their_own_shape(claude, address):
    with pytest.raises(anthropic.NotFoundError, match="there is no model 'none'"):
        claude.messages.create(model="none", max_tokens=5, messages=USER)
    with pytest.raises(anthropic.BadRequestError, match=r"messages\[0\].role must be user or assistant"):
        claude.messages.create(model="echo", max_tokens=5, messages=[{"role": "system", "content": "x"}])
    bad = httpx.post(f"{address}/v1/messages", json={"model": "echo", "messages": USER})
    assert bad.json() == {
        "type": "error",
        "error": {"type": "invalid_request_error", "message": "max_tokens is missing"},
    }


def test_keys_of_both_kinds_of_client_are_taken(served_tokenizer):
    model = fake_model(served_tokenizer, repeating(served_tokenizer, "x"))
    with serving({"m": model}, keys=(KEY,)) as address:
        with anthropic.Anthropic(base_url=address, api_key=KEY, max_retries=0) as claude:
            assert claude.messages.create(model="m", max_tokens=2, messages=USER).content[0].text == "xx"
        with (
            anthropic.Anthropic(base_url=address, api_key="wrong", max_retries=0) as claude,
            pytest.raises(anthropic.AuthenticationError),
        ):
            claude.messages.create(model="m", max_tokens=2, messages=USER)


def test_metrics_count_what_was_asked_and_what_is_in_use(served_tokenizer):
    model = fake_model(served_tokenizer, repeating(served_tokenizer, "x"))
    with serving({"m": model}, slots=3) as address:
        asked = {"model": "m", "messages": USER, "max_tokens": 7}
        for _ in range(2):
            httpx.post(f"{address}/v1/chat/completions", json=asked)
        httpx.post(f"{address}/v1/chat/completions", json={})
        httpx.get(f"{address}/a/path/of/a/client")
        found = dict(re.findall(r"^(qrun_\S+) (\S+)$", httpx.get(f"{address}/metrics").text, re.MULTILINE))
    assert found['qrun_requests_total{route="/v1/chat/completions",status="200"}'] == "2.0"
    assert found['qrun_requests_total{route="/v1/chat/completions",status="400"}'] == "1.0"
    assert found['qrun_requests_total{route="none",status="404"}'] == "1.0"
    assert found['qrun_tokens_total{kind="completion",model="m"}'] == "14.0"
    assert found['qrun_first_token_seconds_count{model="m"}'] == "2.0"
    assert found['qrun_between_tokens_seconds_count{model="m"}'] == "2.0"
    assert found['qrun_slots{model="m"}'] == "3.0"
    assert found['qrun_active_slots{model="m"}'] == "0.0"
    assert float(found['qrun_kv_cache_bytes{model="m"}']) > 0
