"""A model without weights that behaves as an assistant does: it calls a tool where it has some, else echoes.

Clients that others wrote test how a server answers, and need a model that answers sensibly and always alike.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from qrun.model import Model
from qrun.text.tokenizer import Tokenizer
from tests.assets import qwen_tokenizer_folder
from tests.fakes import IM_END, fake_manifest, fake_model, tiny_tokenizer

HEADER = "<|im_start|>assistant\n"
TEMPLATE = json.loads((qwen_tokenizer_folder() / "tokenizer_config.json").read_text())["chat_template"]


def assistant(*, context_length: int = 16_384) -> Model:
    """Echoes what the user said last; with tools, calls the first one and then repeats its result."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = tiny_tokenizer(Path(folder))
    header = tokenizer.encode(HEADER)

    @lru_cache(maxsize=64)
    def answer(prompt: tuple[int, ...]) -> list[int]:
        return [*tokenizer.encode(_answer(tokenizer.decode(prompt, False))), IM_END]

    def rule(seen: list[int]) -> int:
        start = _last(seen, header)
        if start is None:  # a plain completion
            return _letter(tokenizer, len(seen))
        said = len(seen) - start
        whole = answer(tuple(seen[:start]))
        return whole[min(said, len(whole) - 1)]

    manifest = fake_manifest(context_length=context_length)
    return fake_model(tokenizer, rule, manifest=manifest, template=TEMPLATE)


def _last(seen: list[int], header: list[int]) -> int | None:
    """Where the tokens after the last header begin."""
    for start in range(len(seen) - len(header), -1, -1):
        if seen[start : start + len(header)] == header:
            return start + len(header)
    return None


def _letter(tokenizer: Tokenizer, place: int) -> int:
    (found,) = tokenizer.encode("abcdefghij"[place % 10])
    return found


def _answer(prompt: str) -> str:
    turns = re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", prompt, re.DOTALL)
    said = turns[-1][1] if turns else ""
    result = re.search(r"<tool_response>\n(.*?)\n</tool_response>", said, re.DOTALL)
    if result:
        return f"The tool says: {result[1]}"
    tools = re.search(r"<tools>\n(.*?)\n</tools>", prompt, re.DOTALL)
    if tools:
        function = json.loads(tools[1].splitlines()[0])["function"]
        call = {"name": function["name"], "arguments": _value(function.get("parameters", {}))}
        return f"<tool_call>\n{json.dumps(call)}\n</tool_call>"
    return said


def _value(schema: Mapping[str, Any]) -> Any:
    """Something that fits a simple schema."""
    if "enum" in schema:
        return schema["enum"][0]
    kind = schema.get("type", "object")
    if kind == "object":
        properties = schema.get("properties", {})
        return {name: _value(properties.get(name, {})) for name in schema.get("required", properties)}
    return {"string": "Paris", "integer": 1, "number": 1.5, "boolean": True, "array": [], "null": None}[kind]
