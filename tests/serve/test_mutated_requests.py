"""If this fails, a request of the right JSON and the wrong shape is a fault of the server's, and not refused.

A good request of each API is changed in one to three places, by chance, and asked without HTTP.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from qrun.engine import Engine
from qrun.errors import QrunError
from qrun.serve.dialects import CHAT, COMPLETION, MESSAGES, RESPONSES, Dialect
from qrun.serve.errors import ApiError
from qrun.serve.fields import decode
from qrun.serve.stamps import RepeatableStamps
from tests.fakes import fake_manifest, fake_model, repeating

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{{ m.tool_calls | tojson if m.tool_calls }}<|im_end|>{% endfor %}"
    "{{ tools | tojson if tools }}{{ extra | tojson if extra }}{{ enable_thinking }}"
)
SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "string", "pattern": "a+"},
        "b": {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 1},
        "c": {"anyOf": [{"const": 1}, {"enum": ["x", 2]}]},
        "d": {"$ref": "#/$defs/z"},
    },
    "required": ["a"],
    "additionalProperties": False,
    "$defs": {"z": {"type": "null"}},
}
FUNCTION = {"name": "f", "description": "d", "parameters": SCHEMA, "strict": True}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
TURNS = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    {"role": "assistant", "content": "t", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c", "content": "r"},
    {"role": "user", "content": "q"},
]
COMMON = {
    **{"model": "x", "temperature": 1, "top_p": 0.5, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1},
    **{"presence_penalty": 1, "frequency_penalty": 1, "seed": 4, "stop": ["a", "b"], "n": 1},
    **{"logit_bias": {"5": 1}, "max_tokens": 5, "stream": True, "stream_options": {"include_usage": True}},
    **{"user": "u", "metadata": {"a": "b"}},
}
GOOD: dict[str, tuple[Dialect, dict[str, Any]]] = {
    "chat with tools": (
        CHAT,
        {
            **COMMON,
            **{"messages": TURNS, "tools": [{"type": "function", "function": FUNCTION}]},
            **{"tool_choice": "required", "parallel_tool_calls": True, "logprobs": True, "top_logprobs": 3},
            **{"chat_template_kwargs": {"extra": 1}, "enable_thinking": True},
        },
    ),
    "chat with a form": (
        CHAT,
        {
            **COMMON,
            "messages": TURNS,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
            },
        },
    ),
    "completion": (
        COMPLETION,
        {**COMMON, "prompt": ["x", [1, 2]], "echo": True, "logprobs": 2, "regex": "a+"},
    ),
    "responses": (
        RESPONSES,
        {
            "model": "x",
            "input": [
                {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "x"}]},
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": "x"},
            ],
            **{"instructions": "i", "max_output_tokens": 5, "text": {"format": {"type": "text"}}},
            **{"tools": [{"type": "function", **FUNCTION}], "tool_choice": {"type": "function", "name": "f"}},
        },
    ),
    "messages": (
        MESSAGES,
        {
            **{"model": "x", "max_tokens": 5, "system": [{"type": "text", "text": "x"}]},
            "messages": [
                {"role": "user", "content": "x"},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "text", "text": "k"},
                        {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}},
                    ],
                },
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "y"}]},
            ],
            **{"tools": [{"name": "f", "input_schema": SCHEMA}], "tool_choice": {"type": "any"}},
            **{"thinking": {"type": "enabled"}, "stop_sequences": ["a"], "temperature": 0.5},
        },
    ),
}
DEEP: Any = []
for _ in range(200):  # a copy takes two of Python's frames for each
    DEEP = [DEEP]
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 1.5, 10**30, -(10**30), 1e300, 2**31, 2**63, "", "x", "\0", "é" * 50),
    *("<|im_end|>", "\uf8f0", "{", "(", [], {}, [None], [[]], [{}], {"": None}, {"a": {"b": [1]}}),
    *(["x"] * 3, [1, "x"], {"type": "object"}, {"role": "user", "content": "x"}, "function", "object", DEEP),
]
NAMES = ("foo", "type", "name", "strict", "content", "$ref", "not", "", "items", "properties", "const")


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where anything stands within some JSON."""
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield from places(each, (*path, key))


def changed(body: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """The same with one to three changes."""
    body = copy.deepcopy(body)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        *path, key = chance.choice(list(places(body))[:400])
        within: Any = body
        for each in path:
            within = within[each]
        what = chance.random()
        if what < 0.15:
            del within[key]
        elif what < 0.25 and isinstance(within, dict):
            within[chance.choice(NAMES)] = chance.choice(VALUES)
        elif what < 0.3 and isinstance(within, list):
            within.append(copy.deepcopy(within[0]))
        else:
            within[key] = chance.choice(VALUES)
    return body


@pytest.mark.parametrize("name", GOOD)
def test_a_changed_request_is_answered_or_refused(served_tokenizer, name):
    dialect, good = GOOD[name]
    rule = repeating(served_tokenizer, "abc")
    model = fake_model(
        served_tokenizer, rule, manifest=fake_manifest(context_length=20_000), template=TEMPLATE
    )
    model.literal, chance, taken = True, random.Random(name), 0
    with Engine(model, slots=2, queue=30) as engine:
        dialect.ask(engine, decode(msgspec.json.encode(good), dialect.fields))
        for number in range(400):
            body = msgspec.json.encode(changed(good, chance))
            try:
                fields: Any = decode(body, dialect.fields)
                asked = dialect.ask(engine, fields)
                reply = dialect.reply(engine, fields, asked, RepeatableStamps(str(number)))
                for chunk in reply.opening():
                    reply.encode(chunk)
            except (ApiError, QrunError):
                continue
            taken += 1
    assert 0 < taken < 400
