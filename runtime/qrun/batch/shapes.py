"""What is written of a record: OpenAI's batch output line, or the input's columns and the answer's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from qrun.batch.lines import Record

ANSWER_COLUMNS: Mapping[str, type] = {
    "answer": str,
    "finish_reason": str,
    "prompt_tokens": int,
    "completion_tokens": int,
    "error": str,
}
TOOL_COLUMN = "tool_calls"


def batch_output(record: Record, name: str) -> dict[str, Any]:
    """OpenAI's batch output line; ``name`` is the job's, from which ids follow.

    Source: "The request output object" in OpenAI's API reference. A line that is no request has no response.
    """
    key = hashlib.sha256(f"{name}\n{record.number}".encode()).hexdigest()
    response = None
    if record.status:
        response = {"status_code": record.status, "request_id": f"req_{key[32:]}", "body": record.body}
    error = None
    if record.error is not None and response is None:
        error = {"code": record.error, "message": record.message}
    return {
        "id": f"batch_req_{key[:32]}",
        "custom_id": record.custom_id,
        "response": response,
        "error": error,
    }


def answer_columns(record: Record, prefix: str = "", *, tools: bool = False) -> dict[str, Any]:
    """The answer's columns; what a refused line has not is None."""
    answered = record.error is None
    values: dict[str, Any] = {
        "answer": record.text,
        "finish_reason": record.finish_reason,
        "prompt_tokens": record.prompt_tokens if answered else None,
        "completion_tokens": record.completion_tokens if answered else None,
        "error": None if answered else f"{record.error}: {record.message}",
    }
    if tools:
        values[TOOL_COLUMN] = json.dumps(record.tool_calls, ensure_ascii=False) if record.tool_calls else None
    return {prefix + name: value for name, value in values.items()}


def answer_types(prefix: str = "", *, tools: bool = False) -> dict[str, type]:
    """Names and types of ``answer_columns``."""
    types = {**ANSWER_COLUMNS, **({TOOL_COLUMN: str} if tools else {})}
    return {prefix + name: kind for name, kind in types.items()}
