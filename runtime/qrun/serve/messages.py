"""Anthropic's API: what ``POST /v1/messages`` and ``/v1/messages/count_tokens`` ask.

Source: "Messages" and "Tool use" in Anthropic's API documentation.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec

from qrun.engine import Engine
from qrun.errors import QrunError
from qrun.serve.asking import Asked, check_length
from qrun.serve.errors import ApiError, from_qrun
from qrun.serve.fields import check_names, part_text, text_of
from qrun.serve.thinking import of_anthropic
from qrun.serve.tools import Choice, Places, Tools, prompt_with_tools, tools_of

_PLACES = Places("tools[{}]", "input_schema")


class CountRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """``POST /v1/messages/count_tokens``."""

    model: str
    messages: list[dict[str, Any]]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None


class MessagesRequest(CountRequest, kw_only=True):
    """``POST /v1/messages``. The last two are accepted and change nothing."""

    max_tokens: int
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None
    metadata: Any = None
    service_tier: Any = None


def prompt_of(engine: Engine, request: CountRequest) -> tuple[list[int], Tools | None]:
    """The prompt's token ids, and the tools that may be called.

    Raises:
        ApiError: 400, with the field.
    """
    messages = _messages(request.messages)
    if request.system:
        messages.insert(0, {"role": "system", "content": text_of(request.system, "system")})
    tools, variables = _tools(request), of_anthropic(engine.model, request.thinking)
    try:
        return prompt_with_tools(engine.model, messages, tools, variables), tools
    except QrunError as error:
        raise from_qrun(error) from None


def ask_messages(engine: Engine, request: MessagesRequest) -> Asked:
    """One prompt, one answer.

    Raises:
        ApiError: 400, with the field.
    """
    prompt, tools = prompt_of(engine, request)
    check_length(engine, prompt)
    sampling = {
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "stop": request.stop_sequences,
    }
    try:
        params = engine.resolve(sampling)
    except QrunError as error:
        refusal = from_qrun(error)
        name = next((name for name in sampling if error.what.startswith(name)), None)
        if name == "stop":
            name, text = "stop_sequences", refusal.message.replace("stop", "stop_sequences", 1)
            refusal = ApiError(refusal.status, text, code=refusal.code)
        refusal.param = name
        raise refusal from None
    constraint = None if tools is None else tools.constraint(engine.model)
    return Asked([prompt], [params], [""], [constraint], tools)


def _tools(request: CountRequest) -> Tools | None:
    functions = []
    for index, tool in enumerate(request.tools or ()):
        if tool.get("type") not in (None, "custom"):
            place = f"tools[{index}].type"
            raise ApiError(400, f"{place} {tool['type']!r} is not supported here", param=place)
        if "parameters" in tool:
            place = f"tools[{index}].parameters"
            raise ApiError(400, f"{place} is not supported here: it is called input_schema", param=place)
        if not isinstance(tool.get("input_schema"), dict):
            place = f"tools[{index}].input_schema"
            raise ApiError(400, f"{place} must be a JSON schema", param=place)
        function = {**tool, "parameters": tool["input_schema"]}
        for name in ("input_schema", "type", "cache_control"):
            function.pop(name, None)
        functions.append(function)
    choice, parallel = _choice(request.tool_choice)
    return tools_of(functions, choice, parallel, _PLACES)


_MODES = {"auto": "auto", "any": "required", "tool": "required", "none": "none"}


def _choice(given: dict[str, Any] | None) -> tuple[Choice, bool]:
    """What may be called, and whether several calls may."""
    if given is None:
        return Choice(), True
    kind = given.get("type")
    known = ("type", "disable_parallel_tool_use", *(["name"] if kind == "tool" else []))
    extra = next((name for name in given if name not in known), None)
    if extra is not None:
        raise ApiError(400, f"tool_choice.{extra} is not supported here", param=f"tool_choice.{extra}")
    if not isinstance(kind, str) or kind not in _MODES:
        text = f"tool_choice.type must be auto, any, tool or none, not {kind!r}"
        raise ApiError(400, text, param="tool_choice.type")
    if kind == "tool" and not isinstance(given.get("name"), str):
        raise ApiError(400, "tool_choice.name must be a string", param="tool_choice.name")
    alone = given.get("disable_parallel_tool_use", False)
    if not isinstance(alone, bool):
        place = "tool_choice.disable_parallel_tool_use"
        raise ApiError(400, f"{place} must be true or false", param=place)
    return Choice(_MODES[kind], given.get("name")), not alone


def _messages(given: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A conversation in the form of chat completions, in which results of tools are messages of their own."""
    if not given:
        raise ApiError(400, "messages is empty: there is nothing to answer", param="messages")
    found: list[dict[str, Any]] = []
    called: set[str] = set()
    for index, message in enumerate(given):
        where, role = f"messages[{index}]", message.get("role")
        if role not in ("user", "assistant"):
            text = f"{where}.role must be user or assistant, not {role!r}"
            raise ApiError(400, text, param=f"{where}.role")
        if (extra := next((name for name in message if name not in ("role", "content")), None)) is not None:
            raise ApiError(400, f"{where}.{extra} is not supported here", param=f"{where}.{extra}")
        content = message.get("content")
        if not isinstance(content, list):
            found.append({"role": role, "content": text_of(content, f"{where}.content")})
            continue
        said: dict[str, Any] = {"role": role, "content": ""}
        answered = False
        for number, block in enumerate(content):
            place = f"{where}.content[{number}]"
            kind = block.get("type") if isinstance(block, dict) else None
            if kind == "tool_use" and role == "assistant":
                call = _call(block, place)
                called.add(call["id"])
                said.setdefault("tool_calls", []).append(call)
            elif kind == "tool_result" and role == "user":
                if said["content"]:
                    found.append(said)
                    said = {"role": role, "content": ""}
                found.append(_result(block, place, called))
                answered = True
            else:
                said["content"] += part_text(block, place)
        # Results stand for themselves; a message of nothing else but empty text is one all the same.
        if said["content"] or "tool_calls" in said or not answered:
            found.append(said)
    return found


def _call(block: dict[str, Any], place: str) -> dict[str, Any]:
    check_names(block, ("type", "id", "name", "input", "cache_control", "caller"), place)
    for name in ("id", "name"):
        if not isinstance(block.get(name), str):
            raise ApiError(400, f"{place}.{name} must be a string", param=f"{place}.{name}")
    if not isinstance(block.get("input"), dict):
        raise ApiError(400, f"{place}.input must be an object", param=f"{place}.input")
    arguments = json.dumps(block["input"], ensure_ascii=False)
    return {
        "id": block["id"],
        "type": "function",
        "function": {"name": block["name"], "arguments": arguments},
    }


def _result(block: dict[str, Any], place: str, called: set[str]) -> dict[str, Any]:
    check_names(block, ("type", "tool_use_id", "content", "is_error", "cache_control"), place)
    key, content, failed = block.get("tool_use_id"), block.get("content"), block.get("is_error", False)
    if not isinstance(key, str) or key not in called:
        text = f"{place}.tool_use_id: no tool_use before it has the id {key!r}"
        raise ApiError(400, text, param=f"{place}.tool_use_id")
    if failed not in (None, True, False):
        raise ApiError(400, f"{place}.is_error must be true or false", param=f"{place}.is_error")
    text = "" if content is None else text_of(content, f"{place}.content")
    # Templates have no mark for a tool that failed, so the model is told in words.
    return {"role": "tool", "tool_call_id": key, "content": f"Error: {text}" if failed else text}
