"""Whether a model thinks before it answers, as each API asks for it.

Chat templates know one variable, ``enable_thinking``. What says more, such as how many tokens a thought may
take, is refused by its name: nothing here would obey it.

Sources: "Extended thinking" in Anthropic's API documentation, ``reasoning`` in OpenAI's API reference.
"""

from __future__ import annotations

from typing import Any

from qrun.model import Model
from qrun.serve.errors import ApiError
from qrun.serve.tools import check_variables

Variables = dict[str, Any]


def of_anthropic(model: Model, thinking: dict[str, Any] | None) -> Variables:
    """What ``thinking`` of ``/v1/messages`` means to the chat template.

    Raises:
        ApiError: 400, with the field: it asks for more, or the template cannot say it.
    """
    if thinking is None:
        return {}
    known = {"enabled": True, "disabled": False}
    kind = thinking.get("type")
    if not isinstance(kind, str) or kind not in known:
        text = f"thinking.type must be enabled or disabled, not {kind!r}"
        raise ApiError(400, text, param="thinking.type")
    _refuse_others(thinking, "thinking", "type")
    variables = {"enable_thinking": known[kind]}
    check_variables(model, variables, "thinking")
    return variables


def of_effort(model: Model, effort: Any, place: str) -> Variables:
    """What an effort means to the chat template: "none" forbids to think, and None says nothing.

    Raises:
        ApiError: 400, with the field, ``place``: another effort, or the template cannot say it.
    """
    if effort is None:
        return {}
    if effort != "none":
        text = f"{place} must be none, or left out: a model thinks or it does not, no effort is measured here"
        raise ApiError(400, text, param=place)
    check_variables(model, variables := {"enable_thinking": False}, place)
    return variables


def of_reasoning(model: Model, reasoning: dict[str, Any] | None) -> Variables:
    """What ``reasoning`` of ``/v1/responses`` means to the chat template.

    Raises:
        ApiError: see ``of_effort``; or a field that is not supported.
    """
    if reasoning is None:
        return {}
    _refuse_others(reasoning, "reasoning", "effort")
    return of_effort(model, reasoning.get("effort"), "reasoning.effort")


def _refuse_others(given: dict[str, Any], field: str, known: str) -> None:
    for name, value in given.items():
        if name != known and value is not None:
            place = f"{field}.{name}"
            raise ApiError(400, f"{place} is not supported here", param=place)
