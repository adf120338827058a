"""A plan behind the server: the same code with one slot, on an emulated device."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

import qrun
from qrun.cli.serve import source_of
from qrun.engine import Engine
from qrun.serve.models import Models
from tests.emulated.device import EmulatedDevice
from tests.serve.serving import ready, serving, until

CHAT = "/v1/chat/completions"


def ask(address: str, number: int, **more: object) -> dict[str, object]:
    asked = {
        "model": "m",
        "messages": [{"role": "user", "content": "x" * number}],
        "max_tokens": 6,
        "temperature": 0,
        "ignore_eos": True,
        **more,
    }
    response = httpx.post(address + CHAT, json=asked, timeout=60)
    assert response.status_code == 200, response.text
    found: dict[str, object] = response.json()["choices"][0]
    return found


def test_a_plan_answers_as_its_folder_does_however_many_ask(plan: Path, device: EmulatedDevice) -> None:
    with Engine(qrun.open(plan.parent), slots=1) as engine, serving(Models.of({"m": engine})) as address:
        wanted = [ask(address, number) for number in range(1, 6)]
    with (
        serving(Models({"m": source_of(plan, slots=4, prefix_bytes=1 << 20)})) as address,
        ThreadPoolExecutor(5) as pool,
    ):
        until(lambda: httpx.get(f"{address}/ready").status_code == 200)
        assert ready(address)["m"]["slots"] == 1
        assert list(pool.map(lambda number: ask(address, number), range(1, 6))) == wanted
        asked = {"model": "m", "prompt": "hello", "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{address}/v1/completions", json=asked) as response:
            next(response.iter_lines())  # and away
        until(lambda: ready(address)["m"]["active"] == 0)
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["a", "b"]}}}
        found = ask(address, 2, response_format=form, ignore_eos=False, max_tokens=20)
        assert found["message"]["content"] in ('"a"', '"b"')  # type: ignore[index]
