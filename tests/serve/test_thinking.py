"""If these fail, a request that forbids Qwen3 to think is not obeyed, or one that nothing reads is taken."""

from __future__ import annotations

import json
from dataclasses import replace

import httpx
import numpy as np
import openai
import pytest

from qrun.serve.tools import read_tools
from qrun.text.tokenizer import Tokenizer
from tests.assets import qwen3_tokenizer_folder
from tests.fakes import fake_manifest, fake_model, scripted
from tests.serve.serving import serving
from tests.serve.tooling import CLAUDES, OSLO, USER, WEATHER, call

THOUGHT_OF = "\nshould I " + call("get_weather", OSLO) + " or not?\n"
IM_END_OF_QWEN = 151_645
NO_THOUGHT = "<think>\n\n</think>\n\n"
WISHES = [
    {"chat_template_kwargs": {"enable_thinking": False}},
    {"enable_thinking": False},
    {"reasoning_effort": "none"},
]
NAMES = ["kwargs", "field", "effort"]


@pytest.fixture(scope="module")
def address(served_tokenizer):
    """ "qwen3" calls a tool, behind an empty thought unless the prompt has one; "plain" talks.

    "doubtful" and "r1" think of a call and do not make it; the prompt of "r1" opens the thought already.
    """
    source = json.loads((qwen3_tokenizer_folder() / "tokenizer_config.json").read_text())["chat_template"]
    rule = scripted(served_tokenizer, [NO_THOUGHT + call("get_weather", OSLO)])
    manifest = fake_manifest(context_length=4096)
    models = {
        "qwen3": fake_model(served_tokenizer, rule, manifest=manifest, template=source),
        "doubtful": fake_model(
            served_tokenizer,
            scripted(served_tokenizer, [f"<think>{THOUGHT_OF}</think>\nNo."]),
            manifest=manifest,
            template=source,
        ),
        "r1": fake_model(
            served_tokenizer,
            scripted(served_tokenizer, [f"<think>\n{THOUGHT_OF}</think>\nNo."]),
            manifest=manifest,
            template=source + "{{ '<think>\\n' }}",
        ),
        "plain": fake_model(served_tokenizer, scripted(served_tokenizer, ["x"])),
    }
    with serving(models) as found:
        yield found


@pytest.fixture
def ask(address):
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0)
    return lambda model="qwen3", **fields: client.chat.completions.create(
        model=model, messages=USER, temperature=0, **fields
    )


@pytest.mark.parametrize("wish", WISHES, ids=NAMES)
def test_qwen3_s_tools_are_called_with_and_without_a_thought(ask, wish):
    thought = ask(tools=[WEATHER])
    straight = ask(tools=[WEATHER], extra_body=wish)
    for found in (thought, straight):
        (called,) = found.choices[0].message.tool_calls
        assert (called.function.name, json.loads(called.function.arguments)) == ("get_weather", OSLO)
    assert (thought.choices[0].message.content or "").strip() == NO_THOUGHT.strip()
    assert straight.choices[0].message.content is None
    more = straight.usage.prompt_tokens - thought.usage.prompt_tokens
    assert more == len(NO_THOUGHT)  # a token for each of the tiny tokenizer's bytes


@pytest.mark.parametrize("wish", WISHES, ids=NAMES)
def test_a_template_that_knows_no_thinking_refuses_it(ask, wish):
    with pytest.raises(openai.BadRequestError, match="knows no enable_thinking"):
        ask("plain", extra_body=wish)


def test_an_effort_that_nothing_measures_is_refused(ask):
    with pytest.raises(openai.BadRequestError, match="reasoning_effort must be none, or left out"):
        ask(reasoning_effort="high")
    with pytest.raises(openai.BadRequestError, match="exclude each other"):
        ask(reasoning_effort="none", extra_body={"enable_thinking": True})


def prompt_tokens(address, path, **fields):
    body = {"model": "qwen3", "max_tokens": 2, **fields}
    usage = httpx.post(f"{address}{path}", json=body).raise_for_status().json()["usage"]
    return usage["input_tokens"]


def test_the_other_apis_forbid_to_think_in_their_own_words(address):
    thought = prompt_tokens(address, "/v1/messages", messages=USER)
    for kind, more in (("enabled", 0), ("disabled", len(NO_THOUGHT))):
        wish = {"thinking": {"type": kind}}
        assert prompt_tokens(address, "/v1/messages", messages=USER, **wish) == thought + more
        counted = httpx.post(
            f"{address}/v1/messages/count_tokens", json={"model": "qwen3", "messages": USER, **wish}
        )
        assert counted.json() == {"input_tokens": thought + more}
    body = {"model": "qwen3", "input": "How is it in Oslo?", "max_output_tokens": 2}
    found = [
        httpx.post(f"{address}/v1/responses", json={**body, "reasoning": wish}).json()["usage"][
            "input_tokens"
        ]
        for wish in (None, {"effort": None}, {"effort": "none"})
    ]
    assert found == [thought, thought, thought + len(NO_THOUGHT)]


@pytest.mark.parametrize("model", ["doubtful", "r1"])
def test_a_call_that_is_only_thought_of_is_not_made(address, ask, model):
    """A client would have run the tool, and nobody had asked for it."""
    choice = ask(model, tools=[WEATHER]).choices[0]
    assert (choice.message.tool_calls, choice.finish_reason) == (None, "stop")
    assert THOUGHT_OF in choice.message.content
    pieces = [chunk.choices[0].delta for chunk in ask(model, tools=[WEATHER], stream=True)]
    assert not any(piece.tool_calls for piece in pieces)
    assert "".join(piece.content or "" for piece in pieces) == choice.message.content
    body = {"model": model, "max_tokens": 900, "messages": USER, "tools": CLAUDES}
    told = httpx.post(f"{address}/v1/messages", json=body).json()
    assert [block["type"] for block in told["content"]] == ["text"]


@pytest.mark.parametrize("opened", [True, False], ids=["in the prompt", "in the answer"])
def test_a_strict_tool_leaves_room_for_a_thought(opened):
    """Where the form of a call was enforced, Qwen3 could not think: its tags fitted nothing."""
    tokenizer = Tokenizer.from_folder(qwen3_tokenizer_folder())
    manifest = fake_manifest(context_length=4096)
    manifest = replace(manifest, model=replace(manifest.model, vocab_size=tokenizer.id_limit))
    model = fake_model(tokenizer, scripted(tokenizer, [""]), manifest=manifest)
    strict = {**WEATHER, "function": {**WEATHER["function"], "strict": True}}
    constraint = read_tools([strict], "auto", None).constraint(model)

    def allowed(token: str) -> bool:
        scores = constraint.mask(np.zeros(tokenizer.id_limit, np.float32), [IM_END_OF_QWEN])
        return bool(np.isfinite(scores[tokenizer.token_id(token)]))

    assert allowed("<tool_call>")
    for token_id in tokenizer.encode("should I call it?" if opened else "<think>\nshould I?\n"):
        constraint.accept(token_id)
    assert allowed("</think>")
    constraint.accept(tokenizer.token_id("</think>"))
    assert allowed("<tool_call>")
    assert not allowed("<think>")
    constraint.accept(tokenizer.token_id("<tool_call>"))
    assert not allowed("</think>")


def test_a_rendering_takes_them_too(address):
    asked = {"model": "qwen3", "messages": USER, "chat_template_kwargs": {"enable_thinking": False}}
    assert httpx.post(f"{address}/apply-template", json=asked).json()["prompt"].endswith(NO_THOUGHT)
    asked["chat_template_kwargs"] = {"budget": 3}
    refused = httpx.post(f"{address}/apply-template", json=asked)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "chat_template_kwargs.budget"
