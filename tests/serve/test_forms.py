"""If these fail, an answer does not fit the form that a program relies on."""

from __future__ import annotations

import json
from typing import Literal

import openai
import pytest
from pydantic import BaseModel

from tests.fakes import fake_manifest, fake_model, repeating
from tests.serve.serving import serving

USER = [{"role": "user", "content": "hello"}]
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 4}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def as_format(schema, **more):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **more}}


@pytest.mark.parametrize("strict", [True, False, None])
def test_an_answer_fits_its_schema_whole_and_streamed(client, strict):
    for seed in range(4):
        asked = {"model": "long", "messages": USER, "temperature": 2, "seed": seed, "max_tokens": 400}
        asked["response_format"] = as_format(PERSON, strict=strict)
        whole = client.chat.completions.create(**asked).choices[0]
        assert whole.finish_reason == "stop"
        assert set(json.loads(whole.message.content)) == {"name", "age"}
        stream = client.chat.completions.create(**asked, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole.message.content


def test_pydantic_models_through_the_clients_own_helper(client):
    class Event(BaseModel):
        free: bool
        day: Literal["Monday", "Sunday"]

    asked = {"model": "long", "messages": USER, "temperature": 1.5, "seed": 3, "max_tokens": 600}
    found = client.chat.completions.parse(**asked, response_format=Event)
    assert isinstance(found.choices[0].message.parsed, Event)


def test_any_object_and_a_length_that_cuts_it_off(client):
    asked = {"model": "long", "messages": USER, "response_format": {"type": "json_object"}}
    cut = client.chat.completions.create(**asked, max_tokens=3).choices[0]
    assert cut.finish_reason == "length"
    assert cut.message.content.startswith("{")
    text = client.chat.completions.create(
        model="echo", messages=USER, response_format={"type": "text"}
    ).choices[0]
    assert text.message.content == "hello"


def test_expressions_and_grammars_on_both_completions(client):
    for form in ({"regex": "[xyz]{4}"}, {"grammar": "start: /[xyz]{4}/"}):
        chat = client.chat.completions.create(model="echo", messages=USER, n=2, extra_body=form)
        plain = client.completions.create(model="base", prompt=["a", "b"], extra_body=form)
        texts = [choice.message.content for choice in chat.choices] + [c.text for c in plain.choices]
        assert all(len(text) == 4 and set(text) <= set("xyz") for text in texts), texts
    plain = client.completions.create(
        model="base",
        prompt="a",
        max_tokens=400,
        extra_body={"response_format": as_format({"const": [1, "b"]})},
    )
    assert json.loads(plain.choices[0].text) == [1, "b"]


REFUSED = [
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": as_format(5)}, "response_format"),
    ({"response_format": as_format({}, stict=True)}, "response_format.json_schema.stict"),
    ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema"),
    ({"response_format": as_format({"not": {}})}, "response_format"),
    ({"response_format": as_format({"type": "object", "minProperties": 2})}, "response_format"),
    ({"response_format": as_format({"type": "strin"})}, "response_format"),
    ({"response_format": as_format(False)}, "response_format"),
    ({"regex": "(a"}, "regex"),
    ({"regex": 5}, "regex"),
    ({"regex": "a" * 50_000}, "regex"),
    ({"grammar": "start: foo"}, "grammar"),
    ({"grammar": 'start: "a"', "regex": "a"}, "grammar"),
    ({"regex": "a", "ignore_eos": True}, "ignore_eos"),
]


@pytest.mark.parametrize(("changes", "field"), REFUSED, ids=lambda value: str(value)[:50])
def test_a_form_that_cannot_be_enforced_is_refused_by_name(client, changes, field):
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="echo", messages=USER, extra_body=changes)
    assert error.value.param == field


def test_a_keyword_is_named(client):
    with pytest.raises(openai.BadRequestError, match='"uniqueItems"'):
        client.chat.completions.create(
            model="echo", messages=USER, response_format=as_format({"items": {"uniqueItems": True}})
        )


def test_one_that_becomes_too_complex_ends_its_own_answer_and_no_other(served_tokenizer, monkeypatch):
    """The limits of a step hold while others are answered."""
    from qrun.sampling.constraint import ComplexFormError, Constraint

    def too_complex(self, logits, ends):
        raise ComplexFormError("the answer's form is too complex to go on")

    model = fake_model(served_tokenizer, repeating(served_tokenizer, "ab"), manifest=fake_manifest())
    with serving({"m": model}) as address, openai.OpenAI(base_url=f"{address}/v1", api_key="-") as asking:
        free = asking.with_options(max_retries=0).chat.completions
        monkeypatch.setattr(Constraint, "mask", too_complex)
        with pytest.raises(openai.BadRequestError, match="too complex"):
            free.create(model="m", messages=USER, extra_body={"regex": "a+"})
        assert len(free.create(model="m", messages=USER, max_tokens=5).choices[0].message.content) == 5
