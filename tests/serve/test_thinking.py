"""If these fail, a request that forbids Qwen3 to think is not obeyed, or one that nothing reads is taken."""

from __future__ import annotations

import json

import httpx
import openai
import pytest

from tests.assets import qwen3_tokenizer_folder
from tests.fakes import fake_manifest, fake_model, scripted
from tests.serve.serving import serving
from tests.serve.tooling import OSLO, USER, WEATHER, call

NO_THOUGHT = "<think>\n\n</think>\n\n"
WISHES = [{"chat_template_kwargs": {"enable_thinking": False}}, {"enable_thinking": False}]


@pytest.fixture(scope="module")
def address(served_tokenizer):
    """ "qwen3" calls a tool, behind an empty thought unless the prompt has one; "plain" talks."""
    source = json.loads((qwen3_tokenizer_folder() / "tokenizer_config.json").read_text())["chat_template"]
    rule = scripted(served_tokenizer, [NO_THOUGHT + call("get_weather", OSLO)])
    manifest = fake_manifest(context_length=4096)
    models = {
        "qwen3": fake_model(served_tokenizer, rule, manifest=manifest, template=source),
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


@pytest.mark.parametrize("wish", WISHES, ids=["kwargs", "field"])
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


@pytest.mark.parametrize("wish", WISHES, ids=["kwargs", "field"])
def test_a_template_that_knows_no_thinking_refuses_it(ask, wish):
    with pytest.raises(openai.BadRequestError, match="knows no enable_thinking"):
        ask("plain", extra_body=wish)


def test_a_rendering_takes_them_too(address):
    asked = {"model": "qwen3", "messages": USER, "chat_template_kwargs": {"enable_thinking": False}}
    assert httpx.post(f"{address}/apply-template", json=asked).json()["prompt"].endswith(NO_THOUGHT)
    asked["chat_template_kwargs"] = {"budget": 3}
    refused = httpx.post(f"{address}/apply-template", json=asked)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "chat_template_kwargs.budget"
