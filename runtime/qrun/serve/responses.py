"""OpenAI's newer API: ``POST /v1/responses``. Nothing is stored: a conversation is sent whole each time.

Source: "Responses" and "Streaming events" in OpenAI's API reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qrun.engine import Engine
from qrun.serve.asking import Asked, for_each
from qrun.serve.errors import ApiError
from qrun.serve.fields import Common, Harmless, check_names, text_of, with_text
from qrun.serve.thinking import of_reasoning
from qrun.serve.tools import Choice, Places, Tools, arguments_of, prompt_with_tools, tools_of

_PLACES = Places("tools[{}]")


class ResponsesRequest(Harmless, kw_only=True):
    """``POST /v1/responses``. ``stream_options`` is accepted too, and changes nothing."""

    model: str
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = None
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    background: bool = False
    previous_response_id: str | None = None
    conversation: Any = None
    stream_options: Any = None
    truncation: Any = None


def ask_responses(engine: Engine, request: ResponsesRequest) -> Asked:
    """One prompt, one answer.

    Raises:
        ApiError: 400, with the field.
    """
    for name in ("previous_response_id", "conversation"):
        if getattr(request, name) is not None:
            raise ApiError(400, f"{name}: nothing is stored here, send the whole conversation", param=name)
    if request.background:
        raise ApiError(400, "background is not supported here", param="background")
    if request.truncation not in (None, "disabled"):
        raise ApiError(400, "truncation is not supported here", param="truncation")
    if request.max_output_tokens is not None and request.max_output_tokens < 1:
        raise ApiError(400, "max_output_tokens must be a whole number from 1 up", param="max_output_tokens")
    system = [{"role": "system", "content": request.instructions}] if request.instructions else []
    tools = _tools(request)
    variables = of_reasoning(engine.model, request.reasoning)
    prompt = prompt_with_tools(engine.model, [*system, *_messages(request.input)], tools, variables)
    common = Common(
        model=request.model,
        temperature=request.temperature,
        top_p=request.top_p,
        response_format=_response_format(request.text or {}),
    )
    try:
        own = {"max_tokens": request.max_output_tokens}
        return for_each(engine, common, [prompt], [""], own, tools=tools)
    except ApiError as error:
        # The fields' names in this API, in the message as well.
        for theirs, ours in (
            ("response_format.json_schema", "text.format"),
            ("response_format", "text.format"),
            ("max_tokens", "max_output_tokens"),
        ):
            if error.param is not None and error.param.startswith(theirs):
                raise ApiError(
                    error.status, error.message.replace(theirs, ours), param=ours, code=error.code
                ) from None
        raise


def _response_format(text: dict[str, Any]) -> dict[str, Any] | None:
    """``text.format`` in the form of chat completions, where the schema lies one level deeper."""
    extra = next((name for name in text if name != "format"), None)
    if extra is not None:
        raise ApiError(400, f"text.{extra} is not supported here", param=f"text.{extra}")
    form = text.get("format")
    if form is None:
        return None
    if not isinstance(form, dict):
        raise ApiError(400, "text.format must be an object", param="text.format")
    if form.get("type") != "json_schema":
        return form
    return {
        "type": "json_schema",
        "json_schema": {name: value for name, value in form.items() if name != "type"},
    }


def _tools(request: ResponsesRequest) -> Tools | None:
    functions = []
    for index, tool in enumerate(request.tools or ()):
        if tool.get("type") != "function":
            place = f"tools[{index}].type"
            raise ApiError(400, f"{place} {tool.get('type')!r} is not supported here", param=place)
        functions.append({name: value for name, value in tool.items() if name != "type"})
    return tools_of(
        functions, _choice(request.tool_choice), request.parallel_tool_calls is not False, _PLACES
    )


def _choice(choice: str | dict[str, Any] | None) -> Choice:
    if choice is None or choice in ("auto", "none", "required"):
        return Choice("auto" if choice is None else str(choice))
    if isinstance(choice, dict) and choice.get("type") == "function" and isinstance(choice.get("name"), str):
        check_names(choice, ("type", "name"), "tool_choice")
        return Choice("required", choice["name"])
    raise ApiError(400, "tool_choice must be auto, none, required or a function", param="tool_choice")


def _messages(given: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items of a conversation in the form of chat completions."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not given:
        raise ApiError(400, "input is empty: there is nothing to answer", param="input")
    found: list[dict[str, Any]] = []
    called: set[str] = set()
    for index, item in enumerate(given):
        where, kind = f"input[{index}]", item.get("type", "message")
        if kind == "message":
            said = with_text(item, where)
            found.append({key: said[key] for key in ("role", "content")})
        elif kind == "function_call":
            call = _call(item, where)
            called.add(call["id"])
            if not found or found[-1]["role"] != "assistant":
                found.append({"role": "assistant", "content": ""})
            # Calls that follow each other, or a text, are one message of the assistant.
            found[-1].setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            check_names(item, ("type", "id", "call_id", "output", "status"), where)
            key = _text(item, "call_id", where)
            if key not in called:
                text = f"{where}.call_id: no function_call before it has the id {key!r}"
                raise ApiError(400, text, param=f"{where}.call_id")
            content = text_of(item.get("output"), f"{where}.output")
            found.append({"role": "tool", "tool_call_id": key, "content": content})
        else:
            raise ApiError(400, f"{where}.type {kind!r} is not supported here", param=f"{where}.type")
    return found


def _call(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    check_names(item, ("type", "id", "call_id", "name", "arguments", "status"), where)
    function = {name: _text(item, name, where) for name in ("name", "arguments")}
    arguments_of(function["arguments"], f"{where}.arguments")
    return {"id": _text(item, "call_id", where), "type": "function", "function": function}


def _text(item: Mapping[str, Any], name: str, where: str) -> str:
    found = item.get(name)
    if not isinstance(found, str):
        raise ApiError(400, f"{where}.{name} must be a string", param=f"{where}.{name}")
    return found
