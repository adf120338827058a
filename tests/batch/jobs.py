"""Batches in this process, over the model that repeats what it hears."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qrun.batch.opening import Wanted
from qrun.batch.order import Order
from qrun.batch.running import run


def request(name: str, text: str, **body: Any) -> dict[str, Any]:
    """One of OpenAI's batch lines."""
    messages = [{"role": "user", "content": text}]
    asked = {"model": "any", "messages": messages, **body}
    return {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": asked}


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON lines, each of which must be whole."""
    content = path.read_text()
    assert content.endswith("\n")
    return [json.loads(line) for line in content.splitlines()]


def work(
    model, source: Path, output: Path, *, wanted: Wanted | None = None, **options: Any
) -> dict[str, Any]:
    """One start of a job; its summary."""
    order = Order(source, output, wanted or Wanted(), **{"rows": 4, **options})
    return run(order, model)


def beside(output: Path) -> list[str]:
    """What lies in the folder of an output beside it and the inputs."""
    return sorted(each.name for each in output.parent.iterdir() if ".qrun-batch" in each.name)
