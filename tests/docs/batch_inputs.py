"""The files that docs/batch.md speaks of."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet

_REVIEWS = ["Very good.", "Never again!", "It is what it is."]
_SCHEMA = {"type": "object", "properties": {"good": {"type": "boolean"}}, "required": ["good"]}


def write_batch_inputs(folder: Path) -> None:
    """Requests, a table in two formats, prompts and a schema."""
    requests = [
        {
            "custom_id": f"request-{number}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": "any", "messages": [{"role": "user", "content": text}]},
        }
        for number, text in enumerate(_REVIEWS)
    ]
    (folder / "requests.jsonl").write_text("".join(json.dumps(each) + "\n" for each in requests))
    (folder / "reviews.csv").write_text("review\n" + "\n".join(_REVIEWS) + "\n")
    pyarrow.parquet.write_table(pyarrow.table({"review": _REVIEWS}), folder / "reviews.parquet")
    (folder / "prompts.txt").write_text("\n".join(_REVIEWS) + "\n")
    (folder / "schema.json").write_text(json.dumps(_SCHEMA))
