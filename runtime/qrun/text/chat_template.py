"""The checkpoint's own chat template, rendered as transformers renders it, in a sandbox.

A template is a program that came with the weights and cannot be trusted: it runs in Jinja's immutable
sandbox, and sees plain JSON values only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta

from qrun.errors import QrunError
from qrun.text.sandbox import sandbox
from qrun.text.tokenizer import read_special_tokens, read_tokenizer_config

Message = Mapping[str, Any]

# Templates beside the default one, each by its file's name. Source: transformers, ``CHAT_TEMPLATE_DIR``.
ADDITIONAL_TEMPLATES = "additional_chat_templates"
_RESERVED = ("messages", "tools", "documents", "add_generation_prompt")
# The names under which APIs pass a message's reasoning; the first is the one that templates read.
_REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")
# How to turn a subclass (an enum, say) into the plain type, without methods of its own.
_SCALARS: tuple[tuple[type, Callable[[Any], Any]], ...] = (
    (str, str.__str__),
    (int, int.__int__),
    (float, float.__float__),
)


class ChatTemplate:
    """Turns messages into the one prompt that the model was trained on.

    Args:
        templates: Jinja source by name. "tool_use" is taken when tools are given, "default" otherwise; see
            ``named``.
        special_tokens: named special tokens that the templates may use.
        where: the file they come from, for error messages.

    Raises:
        QrunError: a template's syntax is wrong; names the line.
    """

    def __init__(
        self,
        templates: Mapping[str, str],
        special_tokens: Mapping[str, str],
        *,
        where: str | Path | None = None,
    ) -> None:
        environment = sandbox()
        self._where = where
        self._special_tokens = dict(special_tokens)
        self._chosen: str | None = None
        self._given: dict[str, Any] = {}
        self._templates = {name: self._compile(environment, source) for name, source in templates.items()}
        self._variables = {
            name: meta.find_undeclared_variables(environment.parse(source))
            for name, source in templates.items()
        }

    @classmethod
    def from_folder(cls, folder: str | Path) -> ChatTemplate:
        """Read ``chat_template.jinja``, or else the template(s) in ``tokenizer_config.json``.

        Those in ``additional_chat_templates/`` are read as well.

        Raises:
            QrunError: there is no template, or its syntax is wrong.
        """
        folder = Path(folder)
        special_tokens = read_special_tokens(folder)
        path = folder / "chat_template.jinja"
        if path.is_file():
            templates = {"default": _source(path)}
        else:
            path = folder / "tokenizer_config.json"
            templates = _named_templates(read_tokenizer_config(folder).get("chat_template"), path)
        made = cls(templates, special_tokens, where=path)
        for other in sorted((folder / ADDITIONAL_TEMPLATES).glob("*.jinja")):
            more = cls({other.stem: _source(other)}, special_tokens, where=other)
            made._templates |= more._templates
            made._variables |= more._variables
        return made

    @property
    def names(self) -> tuple[str, ...]:
        """What ``named`` takes."""
        return tuple(self._templates)

    def named(self, name: str) -> ChatTemplate:
        """The same templates, of which the one of this name is always taken.

        Raises:
            QrunError: there is none.
        """
        if name not in self._templates:
            raise QrunError(
                f"no chat template is called {name!r}, only {', '.join(map(repr, self._templates))}",
                where=self._where,
                hint="give one of these names, or leave --chat-template out",
            )
        chosen = copy.copy(self)
        chosen._chosen = name
        return chosen

    def given(self, variables: Mapping[str, Any]) -> ChatTemplate:
        """The same templates with further variables, such as ``{"enable_thinking": False}``.

        Raises:
            QrunError: a variable that no template reads, so that it would change nothing; by name.
        """
        chosen = [self._chosen] if self._chosen is not None else list(self._templates)
        read = set().union(*(self._variables[name] for name in chosen))
        for name in variables:
            if name in _RESERVED or name in self._special_tokens:
                raise QrunError(f"{name!r} cannot be passed to the chat template as an extra variable")
            if name not in read:
                raise QrunError(
                    f"the model's chat template knows no {name}",
                    where=self._where,
                    hint="leave it out: it would change nothing",
                )
        found = copy.copy(self)
        found._given = {**self._given, **_plain(variables)}
        return found

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **extra: Any,
    ) -> str:
        """The prompt's text, equal to ``tokenizer.apply_chat_template(..., tokenize=False)``.

        Args:
            messages: at least one, each with a "role"; keys whose value is None count as absent.
            tools: JSON schemas of the functions that the model may call.
            add_generation_prompt: end with the start of the assistant's turn.
            extra: further variables that the template may read, such as ``enable_thinking=False``.

        Raises:
            QrunError: the messages are misshapen, or the template refuses them or fails.
        """
        taken = [name for name in _RESERVED if name in extra]
        if taken:
            raise QrunError(f"{taken[0]!r} cannot be passed to the chat template as an extra variable")
        context = {
            **self._special_tokens,
            **self._given,
            **_plain(extra),
            "messages": [_with_reasoning(message) for message in _checked(messages)],
            "tools": None if tools is None else _checked_tools(tools),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._choose(with_tools=tools is not None).render(context)
        except jinja2.TemplateError as error:  # raise_exception() in the template, or the sandbox
            raise self._failure(f"the chat template refuses these messages: {error}") from error
        except Exception as error:  # a template is a program and may raise anything
            raise self._failure(f"the chat template failed: {type(error).__name__}: {error}") from error

    def _choose(self, *, with_tools: bool) -> jinja2.Template:
        if self._chosen is not None:
            return self._templates[self._chosen]
        if with_tools and "tool_use" in self._templates:
            return self._templates["tool_use"]
        if "default" not in self._templates:
            raise QrunError(
                f"no chat template is called 'default', only {', '.join(map(repr, self._templates))}",
                where=self._where,
                hint="rename the one to use in tokenizer_config.json to 'default'",
            )
        return self._templates["default"]

    def _compile(self, environment: jinja2.Environment, source: str) -> jinja2.Template:
        try:
            return environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise QrunError(
                f"the chat template's syntax is wrong in line {error.lineno}: {error.message}",
                where=self._where,
                hint="copy the template from the checkpoint again",
            ) from error
        except (
            RecursionError,
            SyntaxError,
            ValueError,
            OverflowError,
        ) as error:  # of Python, on Jinja's output
            raise QrunError(
                f"the chat template cannot be compiled: {error}",
                where=self._where,
                hint="copy the template from the checkpoint again",
            ) from error

    def _failure(self, what: str) -> QrunError:
        hint = "check the messages' roles and contents against what the template expects"
        return QrunError(what, where=self._where, hint=hint)


def _source(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except ValueError as error:
        raise QrunError(f"the chat template is not UTF-8: {error}", where=path) from error


def _named_templates(found: object, where: Path) -> dict[str, str]:
    """``chat_template`` is one source, or a list of ``{"name": ..., "template": ...}``."""
    if found is None:
        raise QrunError(
            "the model has no chat template",
            where=where.parent,
            hint="give a plain prompt instead of a chat, or put a chat_template.jinja into the folder",
        )
    if isinstance(found, str):
        return {"default": found}
    named: dict[str, str] = {}
    for entry in found if isinstance(found, list) else [found]:
        name, source = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(source, str):
            named.clear()
            break
        named[name] = source
    if not named:
        raise QrunError(
            "chat_template must be a template, or a list of objects with name and template",
            where=where,
            hint="copy the file from the checkpoint again",
        )
    return named


def _checked(messages: Sequence[Message]) -> list[dict[str, Any]]:
    shape = 'messages must be a list such as [{"role": "user", "content": "Hello"}]'
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise QrunError(f"{shape}, not a {type(messages).__name__}")
    if not messages:
        raise QrunError("there are no messages to render", hint="give at least one")
    checked = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise QrunError(f"{shape}; message {index} is {message!r}", where=f"messages[{index}]")
        # APIs send content=None beside tool_calls; templates would print the word None.
        checked.append({key: _plain(value) for key, value in message.items() if value is not None})
    return checked


def _checked_tools(tools: Sequence[Mapping[str, Any]]) -> list[Any]:
    if isinstance(tools, (str, bytes, Mapping)) or not all(isinstance(tool, Mapping) for tool in tools):
        raise QrunError(
            "tools must be a list of JSON schemas",
            hint='such as [{"type": "function", "function": {"name": ..., "parameters": ...}}]',
        )
    return [_plain(tool) for tool in tools]


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    reasoning = next((message[name] for name in _REASONING_NAMES if name in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _plain(value: object) -> Any:
    """A copy in JSON's own types: an object with methods could let a template out of its sandbox."""
    try:
        return _copied(value)
    except RecursionError:
        raise too_deep() from None


def too_deep() -> QrunError:
    """Lists and objects within each other, further than Python follows them."""
    return QrunError("messages, tools or variables are nested too deeply", hint="nest them less")


def _copied(value: object) -> Any:
    if value is None or isinstance(value, bool):
        return value
    for kind, strip in _SCALARS:
        if isinstance(value, kind):
            return strip(value)
    if isinstance(value, Mapping):
        return {_copied(key): _copied(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_copied(item) for item in value)
    if isinstance(value, list):
        return [_copied(item) for item in value]
    raise QrunError(
        f"a chat template takes JSON values, not a {type(value).__name__}",
        hint="pass text, numbers, lists and objects only",
    )
