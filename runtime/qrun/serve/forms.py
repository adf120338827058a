"""What an answer must look like: response_format, regex and grammar."""

from __future__ import annotations

from typing import Any

from qrun.engine import Engine
from qrun.errors import QrunError
from qrun.sampling.constraint import Constraint
from qrun.serve.errors import ApiError, from_qrun
from qrun.serve.fields import Common

_KINDS = ("text", "json_object", "json_schema")


def constraint_of(engine: Engine, request: Common) -> Constraint | None:
    """The form that was asked for, None for none. It is compiled, so call this outside of the event loop.

    Raises:
        ApiError: 400, with the field.
    """
    schema = schema_of(request.response_format)
    asked = {"response_format": schema, "regex": request.regex, "grammar": request.grammar}
    given = [name for name, value in asked.items() if value is not None]
    if not given:
        return None
    if request.ignore_eos:
        text = f"ignore_eos contradicts {given[0]}: such an answer ends where it is complete"
        raise ApiError(400, text, param="ignore_eos")
    try:
        return engine.model.constraint(schema=schema, regex=request.regex, grammar=request.grammar)
    except QrunError as error:
        refusal = from_qrun(error)
        refusal.param = given[-1]
        raise refusal from None


def schema_of(response_format: dict[str, Any] | None, place: str = "response_format") -> Any:
    """The JSON schema of an answer, None for text.

    Raises:
        ApiError: 400, with the field.
    """
    if response_format is None:
        return None
    kind = response_format.get("type")
    if kind not in _KINDS:
        raise ApiError(400, f"{place}.type must be one of {', '.join(_KINDS)}, not {kind!r}", param=place)
    described = response_format.get("json_schema")
    extra = [name for name in response_format if name not in ("type", "json_schema")]
    if kind != "json_schema":
        extra += ["json_schema"] if described is not None else []
    elif not isinstance(described, dict) or not isinstance(described.get("schema"), dict | bool):
        raise ApiError(400, f"{place}.json_schema.schema must be a JSON schema", param=place)
    else:
        known = ("name", "description", "schema", "strict")
        extra += [f"json_schema.{name}" for name in described if name not in known]
    if extra:
        raise ApiError(400, f"{place}.{extra[0]} is not supported here", param=f"{place}.{extra[0]}")
    if kind == "json_schema":
        # "strict" makes no difference here: the schema is enforced with and without it.
        return described["schema"]  # type: ignore[index]
    return {"type": "object"} if kind == "json_object" else None
