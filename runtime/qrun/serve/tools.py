"""Tools of a chat: what is given, which may be called, and what the answer must then look like."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qrun.chat import template_of
from qrun.errors import QrunError
from qrun.model import Model
from qrun.sampling.constraint import Constraint, inline
from qrun.serve.errors import ApiError
from qrun.serve.fields import check_names
from qrun.text.tool_calls import CLOSING, OPENING, THOUGHT, THOUGHT_END, ToolCallParser

_MOST_CALLS = 16  # in an answer that a grammar constrains
_END_OF_PROMPT = 16  # tokens in which an opening tag and the blanks behind it find room
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
_EMPTY = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class Places:
    """How an API names the parts of a tool, for refusals.

    Attributes:
        function: the place of the n-th one.
        parameters: its word for the schema.
    """

    function: str = "tools[{}].function"
    parameters: str = "parameters"

    def of(self, index: int, name: str) -> str:
        """The place of one field of a tool."""
        return f"{self.function.format(index)}.{self.parameters if name == 'parameters' else name}"


@dataclass(frozen=True)
class Choice:
    """Which tools may be called.

    Attributes:
        mode: "auto", "none" or "required".
        only: with "required", the name of the one that must be called; None for any.
    """

    mode: str = "auto"
    only: str | None = None


@dataclass(frozen=True)
class Tools:
    """The tools of a request.

    Attributes:
        given: as the chat template takes them.
        choice: which may be called; its mode is "auto" or "required".
        parallel: whether an answer may hold several calls.
        places: how they are named in refusals.
    """

    given: tuple[Mapping[str, Any], ...]
    choice: Choice
    parallel: bool
    places: Places

    @property
    def names(self) -> list[str]:
        """Of all tools."""
        return [tool["function"]["name"] for tool in self.given]

    @property
    def forced(self) -> bool:
        """Whether the answer must be a call."""
        return self.choice.mode == "required"

    def parser(self, model: Model, prompt: Sequence[int]) -> ToolCallParser:
        """For the answer to a prompt, given as token ids."""
        end = model.tokenizer.decode(prompt[-_END_OF_PROMPT:], skip_special_tokens=False)
        opened = end.rstrip().endswith(THOUGHT) and not self.forced
        return ToolCallParser(self.names, parallel=self.parallel, in_thought=opened)

    def constraint(self, model: Model) -> Constraint | None:
        """What an answer must look like; None where it is free.

        Raises:
            ApiError: 400, with the tool whose parameters cannot be enforced.
        """
        strict = any(tool["function"].get("strict") for tool in self.given)
        if not self.forced and not strict:
            return None
        whole_tags = model.tokenizer.token_id(OPENING) is not None
        if not self.forced and not whole_tags:
            text = f"strict needs tool_choice required or a name: {OPENING} is no token of this model"
            raise ApiError(400, text, param="tools")
        picked = [
            (index, tool["function"])
            for index, tool in enumerate(self.given)
            if self.choice.only in (None, tool["function"]["name"])
        ]
        rules = [] if self.forced else _free_text(model)
        more = f'("\\n" call){{0,{_MOST_CALLS - 1}}}' if self.parallel else ""
        opening, closing = (OPENING, CLOSING) if whole_tags else (f'"{OPENING}"', f'"{CLOSING}"')
        rules += [
            f"{'start' if self.forced else 'calls'}: call {more}",
            f'call: {opening} "\\n" body "\\n" {closing}',
            "body: " + " | ".join(f"tool_{index}" for index, _ in picked),
        ]
        for index, function in picked:
            begin = json.dumps(f'{{"name": "{function["name"]}", "arguments": ')
            try:
                parameters = inline(_parameters(function))
                rules += [f'tool_{index}: {begin} arguments_{index} "}}"', f"arguments_{index}: {parameters}"]
                # Each schema is compiled alone before the whole grammar is, so that a refusal names its tool.
                model.constraint(grammar=f"start: {parameters}")
            except QrunError as error:
                place = self.places.of(index, "parameters")
                text = error.what.replace("grammar cannot", "schema cannot")
                raise ApiError(400, f"{place}: {text}", param=place) from None
        return model.constraint(grammar="\n".join(rules))


def _free_text(model: Model) -> list[str]:
    """What may stand before calls: text, and a thought, whose opening tag may be in the prompt."""
    text = r"TEXT: /(.|\n)+/"
    if any(model.tokenizer.token_id(tag) is None for tag in (THOUGHT, THOUGHT_END)):
        return ["start: TEXT? calls?", text]
    return ["start: thought? TEXT? calls?", f"thought: {THOUGHT}? TEXT? {THOUGHT_END}", text]


def read_tools(tools: Any, choice: Any, parallel: bool | None) -> Tools | None:
    """The tools of a chat completion; None where none may be called.

    Raises:
        ApiError: 400, with the field.
    """
    functions = []
    for index, tool in enumerate(tools or ()):
        place = f"tools[{index}]"
        if tool.get("type") != "function" or not isinstance(tool.get("function"), dict):
            text = f"{place} must be a function, as {{type: function, function: ...}}"
            raise ApiError(400, text, param=place)
        check_names(tool, ("type", "function", "cache_control"), place)
        functions.append(tool["function"])
    if not functions and parallel is not None:
        raise ApiError(400, "parallel_tool_calls needs tools", param="parallel_tool_calls")
    return tools_of(functions, _choice(choice), parallel is not False, Places())


def tools_of(
    functions: Sequence[Mapping[str, Any]], choice: Choice, parallel: bool, places: Places
) -> Tools | None:
    """Tools in the form in which templates take them; None where none may be called.

    Args:
        functions: each with name, description, parameters and strict.
        choice: which may be called.
        parallel: whether an answer may hold several calls.
        places: how the API names their fields.

    Raises:
        ApiError: 400, with the field.
    """
    given = tuple(_checked(function, index, places) for index, function in enumerate(functions))
    names = [tool["function"]["name"] for tool in given]
    if len(set(names)) < len(names):
        raise ApiError(400, "tools: two of them have the same name", param="tools")
    if choice.mode == "required" and not given:
        raise ApiError(400, "tool_choice needs tools", param="tool_choice")
    if choice.only is not None and choice.only not in names:
        raise ApiError(400, f"tool_choice: there is no tool {choice.only!r}", param="tool_choice")
    return Tools(given, choice, parallel, places) if given and choice.mode != "none" else None


def _checked(function: Mapping[str, Any], index: int, places: Places) -> Mapping[str, Any]:
    known = {"name": str, "description": str, "parameters": dict, "strict": bool}
    for name, value in function.items():
        place = places.of(index, name)
        if name not in known:
            raise ApiError(400, f"{place} is not supported here", param=place)
        if value is not None and not isinstance(value, known[name]):
            raise ApiError(400, f"{place} has the wrong type", param=place)
    if not _NAME.fullmatch(function.get("name") or ""):
        place = places.of(index, "name")
        text = f"{place} must be 1 to 64 letters, digits, dots, dashes or underscores"
        raise ApiError(400, text, param=place)
    kept = {name: value for name, value in function.items() if value is not None}
    return {"type": "function", "function": kept}


def _choice(choice: Any) -> Choice:
    if choice is None or choice in ("auto", "none", "required"):
        return Choice(choice or "auto")
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(choice, dict) or choice.get("type") != "function" or not isinstance(name, str):
        raise ApiError(400, "tool_choice must be auto, none, required or a function", param="tool_choice")
    check_names(choice, ("type", "function"), "tool_choice")
    check_names(function or {}, ("name",), "tool_choice.function")
    return Choice("required", name)


def _parameters(function: Mapping[str, Any]) -> Mapping[str, Any]:
    given = function.get("parameters")
    if given is None:
        return _EMPTY
    if given.get("type", "object") != "object":
        raise QrunError("the type of a function's parameters is object")
    return {**given, "type": "object"}


def check_variables(model: Model, variables: Mapping[str, Any], place: str | None = None) -> None:
    """Refuse what the chat template does not read.

    Args:
        model: whose template it is.
        variables: what is given beside messages and tools.
        place: the field that asked for it; None for ``chat_template_kwargs``.

    Raises:
        ApiError: 400, with the field.
    """
    for name, value in variables.items():
        try:
            template_of(model).given({name: value})
        except QrunError as error:
            param = place or f"chat_template_kwargs.{name}"
            text = error.what if place is None else f"{place}: {error.what}"
            raise ApiError(400, text, param=param) from None


def prompt_with_tools(
    model: Model,
    messages: list[dict[str, Any]],
    tools: Tools | None,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """The prompt of a chat in which tools may be called, or were.

    Raises:
        ApiError: 400: the model's chat template has no place for tools.
        QrunError: see ``Model.chat_prompt``.
    """
    given = None if tools is None else tools.given
    as_objects = [_with_calls(message, f"messages[{index}]") for index, message in enumerate(messages)]
    try:
        prompt = model.chat_prompt(as_objects, tools=given, variables=variables)
    except QrunError:
        if not any(message.get("tool_calls") for message in messages):
            raise
        # Some templates expect the arguments as text.
        prompt = model.chat_prompt(messages, tools=given, variables=variables)
    if tools is None or tools.forced:
        return prompt
    if prompt == model.chat_prompt(as_objects, variables=variables):
        text = "this model's chat template has no place for tools: it would never hear of them"
        raise ApiError(400, text, param="tools")
    return prompt


def _with_calls(message: dict[str, Any], place: str) -> dict[str, Any]:
    """A message whose calls have their arguments as objects, as most templates expect them."""
    calls = message.get("tool_calls")
    if calls is None:
        return message
    if message["role"] != "assistant" or not isinstance(calls, list):
        where = f"{place}.tool_calls"
        raise ApiError(400, f"{where} must be a list, in a message of an assistant", param=where)
    found = []
    for index, call in enumerate(calls):
        where = f"{place}.tool_calls[{index}]"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ApiError(400, f"{where}.function must have a name", param=f"{where}.function")
        arguments = arguments_of(function.get("arguments"), f"{where}.function.arguments")
        found.append({**call, "function": {**function, "arguments": arguments}})
    return {**message, "tool_calls": found}


def arguments_of(text: Any, place: str) -> dict[str, Any]:
    """The arguments of an earlier call, which come as text.

    Raises:
        ApiError: 400: they are no JSON object.
    """
    try:
        arguments = json.loads(text or "{}")
    except (TypeError, ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise ApiError(400, f"{place} must be a JSON object as text", param=place)
    return arguments
