"""Two tools, and what a model says that calls them."""

from __future__ import annotations

import json

from tests.assets import qwen_tokenizer_folder

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "How it is outside",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Oslo", "Rome"]},
                "days": {"type": "integer", "minimum": 0, "maximum": 9},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
TIME = {"type": "function", "function": {"name": "get_time"}}
USER = [{"role": "user", "content": "How is it in Oslo?"}]


def call(name: str, arguments: object) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


QWEN_TEMPLATE = json.loads((qwen_tokenizer_folder() / "tokenizer_config.json").read_text())["chat_template"]
OSLO = {"city": "Oslo", "days": 1}

# The same two tools as the other APIs write them.
FLAT = [{"type": "function", **tool["function"]} for tool in (WEATHER, TIME)]
CLAUDES = [
    {
        "name": "get_weather",
        "description": "How it is outside",
        "input_schema": WEATHER["function"]["parameters"],
    },
    {"name": "get_time", "input_schema": {"type": "object", "properties": {}, "additionalProperties": False}},
]
