"""From the bytes of a request to its typed fields; a field that is not known is refused, not ignored."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

import msgspec

from qrun.serve.errors import ApiError

Request = TypeVar("Request", bound=msgspec.Struct)
_PLACE = re.compile(r" - at `\$\.?(.*)`$")
_UNKNOWN = re.compile(r"^Object contains unknown field `(.*)`$")
ROLES = ("system", "developer", "user", "assistant", "tool")  # of messages
_MISSING = re.compile(r"^Object missing required field `(.*)`$")


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """``stream_options`` of both kinds of completion."""

    include_usage: bool = False
    include_obfuscation: bool = False  # accepted without effect: lengths of chunks are never hidden here


class Harmless(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Fields of OpenAI's APIs that are accepted and change nothing."""

    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None


class Common(Harmless, kw_only=True):
    """What both kinds of completion take. None is "not given": the model's own default."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    n: int | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: int | None = None
    ignore_eos: bool = False
    response_format: dict[str, Any] | None = None
    regex: str | None = None
    grammar: str | None = None


class ChatRequest(Common, kw_only=True):
    """``POST /v1/chat/completions``."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    enable_thinking: bool | None = None
    reasoning_effort: str | None = None

    @property
    def variables(self) -> dict[str, Any]:
        """What the chat template is given beside messages and tools."""
        thinking = {} if self.enable_thinking is None else {"enable_thinking": self.enable_thinking}
        return {**(self.chat_template_kwargs or {}), **thinking}


class CompletionRequest(Common, kw_only=True):
    """``POST /v1/completions``."""

    prompt: str | list[str | int | list[int]]  # of one kind; see ``asking``
    echo: bool = False
    logprobs: int | None = None
    best_of: int | None = None
    suffix: str | None = None


class TokenizeRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """``POST /tokenize``."""

    content: str
    model: str | None = None
    add_special: bool = False


class DetokenizeRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """``POST /detokenize``."""

    tokens: list[int]
    model: str | None = None


class TemplateRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """``POST /apply-template``."""

    messages: list[dict[str, Any]]
    model: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


def decode(body: bytes, kind: type[Request]) -> Request:
    """The fields of a request.

    Raises:
        ApiError: 400, with the field where there is one.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _refusal(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None


def _refusal(text: str) -> ApiError:
    place = _PLACE.search(text)
    path, what = ("", text) if place is None else (place[1].replace("[...]", ""), text[: place.start()])
    for pattern, message in (
        (_UNKNOWN, "{} is not supported here"),
        (_MISSING, "{} is missing"),
    ):
        if found := pattern.match(what):
            name = f"{path}.{found[1]}".lstrip(".")
            return ApiError(400, message.format(name), param=name)
    field = path or None
    return ApiError(400, f"{field or 'the body'}: {what[0].lower()}{what[1:]}", param=field)


# Of messages: what is read, and what clients send back of our own answers or for people.
_OF_MESSAGE = frozenset(
    ("role", "content", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "thinking")
)
_BESIDE_MESSAGE = frozenset(
    (
        *("name", "id", "type", "status", "refusal", "annotations", "cache_control", "phase"),
        *("provider_specific_fields", "thinking_blocks"),  # LiteLLM's
    )
)
_OF_PART = frozenset(("type", "text", "annotations", "logprobs", "citations", "cache_control"))


def check_names(given: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Refuse a field within a request that nobody reads. An empty one asks for nothing.

    Raises:
        ApiError: 400, with the field.
    """
    for name, value in given.items():
        if name not in known and value not in (None, False, "", [], {}):
            raise ApiError(400, f"{where}.{name} is not supported here", param=f"{where}.{name}")


def texts_only(messages: list[dict[str, Any]], where: str = "messages") -> list[dict[str, Any]]:
    """Messages whose contents are strings: parts of text are joined. ``where`` is the field's name.

    Raises:
        ApiError: 400: a message without a role, a part that is not text, or a field that is not known.
    """
    if not messages:
        raise ApiError(400, f"{where} is empty: there is nothing to answer", param=where)
    return [with_text(message, f"{where}[{index}]") for index, message in enumerate(messages)]


def with_text(message: dict[str, Any], where: str) -> dict[str, Any]:
    """One message whose content is a string; ``where`` is its place in the request.

    Raises:
        ApiError: see ``texts_only``.
    """
    role, content = message.get("role"), message.get("content")
    # Templates leave out a message whose role they do not know, and the model would never see it.
    if role not in ROLES:
        text = f"{where}.role must be one of {', '.join(ROLES)}, not {role!r}"
        raise ApiError(400, text, param=f"{where}.role")
    check_names(message, _OF_MESSAGE | _BESIDE_MESSAGE, where)
    if role == "developer":  # OpenAI's newer word
        role = "system"
    if content is None:
        if not message.get("tool_calls"):
            raise ApiError(400, f"{where}.content is missing", param=f"{where}.content")
        return {**message, "role": role}
    return {**message, "role": role, "content": text_of(content, f"{where}.content")}


def text_of(content: Any, where: str) -> str:
    """A content as one string, whose parts must all be text.

    Raises:
        ApiError: 400, with the part.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError(400, f"{where} must be a string or a list of parts", param=where)
    return "".join(part_text(part, f"{where}[{index}]") for index, part in enumerate(content))


def part_text(part: Any, where: str) -> str:
    """The text of one part of a content.

    Raises:
        ApiError: 400: it is another kind of part.
    """
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
        raise ApiError(400, f"{where} is {kind!r}: this model reads text only", param=where)
    check_names(part, _OF_PART, where)
    text: str = part["text"]
    return text
