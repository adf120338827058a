"""Several models under one limit of memory: none is closed under its readers, none stays away for ever."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from weakref import WeakSet

import httpx
import pytest

from qrun.backends.kvcache import MINIMUM_CAPACITY
from qrun.backends.ledger import LEDGER
from qrun.engine import Engine
from qrun.errors import QrunError
from qrun.folder.manifest import forecast_bytes
from qrun.serve import models as models_module
from qrun.serve.models import Models, Source
from tests.fakes import fake_manifest, fake_model, repeating
from tests.serve.serving import ready, serving, until

CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "hello"}]
MANIFEST = fake_manifest(context_length=4096)
SLOTS = 2
CACHE = forecast_bytes(MANIFEST, MINIMUM_CAPACITY, SLOTS)
WEIGHTS = 10_000_000


class House:
    """Sources of models, each with a letter that it answers with, and a record of what was opened."""

    def __init__(self, tokenizer, names: str) -> None:
        self.opened: list[str] = []
        self.fault: Exception | None = None
        self.may_open = threading.Event()
        self.may_open.set()
        self.may_step = threading.Event()
        self.may_step.set()
        self._tokenizer = tokenizer
        self.models = Models({name: self._source(name) for name in names}, lazy=True)

    def _source(self, name: str) -> Source:
        letter = repeating(self._tokenizer, name)

        def rule(seen):
            assert self.may_step.wait(20)
            return letter(seen)

        def opened() -> Engine:
            assert self.may_open.wait(20)
            self.opened.append(name)
            if self.fault is not None:
                raise self.fault
            return Engine(fake_model(self._tokenizer, rule, manifest=MANIFEST), slots=SLOTS)

        return Source(opened, MANIFEST, SLOTS, weight_bytes=WEIGHTS)


@contextmanager
def house(tokenizer, names: str, *, fit: int) -> Iterator[tuple[House, str]]:
    """A server in which so many of the models fit at the same time."""
    # Caches of other tests, which the garbage collector may take away meanwhile, do not count.
    others, LEDGER._holders = LEDGER._holders, WeakSet()
    found = House(tokenizer, names)
    LEDGER.limit = fit * (WEIGHTS + CACHE)
    try:
        with serving(found.models) as address:
            yield found, address
    finally:
        found.may_open.set()
        found.may_step.set()
        LEDGER.limit, LEDGER._holders = None, others


def ask(address: str, model: str, **more) -> httpx.Response:
    asked = {"model": model, "messages": USER, "max_tokens": 3, **more}
    return httpx.post(address + CHAT, json=asked, timeout=30)


def text(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def states(address: str) -> dict[str, str]:
    return {each["id"]: each["state"] for each in httpx.get(f"{address}/v1/models").json()["data"]}


def test_a_model_is_opened_by_its_first_request_and_the_least_recently_used_one_closed(served_tokenizer):
    with house(served_tokenizer, "abc", fit=2) as (found, address):
        assert states(address) == dict.fromkeys("abc", "unloaded")
        assert httpx.get(f"{address}/ready").status_code == 200
        assert [text(ask(address, name)) for name in "aba"] == ["aaa", "bbb", "aaa"]
        assert found.opened == ["a", "b"]
        assert text(ask(address, "c")) == "ccc"
        assert states(address) == {"a": "loaded", "b": "unloaded", "c": "loaded"}
        assert text(ask(address, "b")) == "bbb"
        assert states(address) == {"a": "unloaded", "b": "loaded", "c": "loaded"}
        assert found.opened == ["a", "b", "c", "b"]


def test_first_requests_at_once_open_it_once(served_tokenizer):
    with house(served_tokenizer, "ab", fit=2) as (found, address), ThreadPoolExecutor(12) as pool:
        found.may_open.clear()
        asked = [pool.submit(ask, address, "a") for _ in range(12)]
        until(lambda: found.models["a"].uses == 12)
        assert states(address)["a"] == "loading"
        assert httpx.get(f"{address}/health").status_code == 200
        found.may_open.set()
        assert [text(each.result()) for each in asked] == ["aaa"] * 12
        assert found.opened == ["a"]
        until(lambda: found.models["a"].uses == 0)


def test_one_with_requests_in_it_is_never_closed(served_tokenizer):
    with house(served_tokenizer, "ab", fit=1) as (found, address), ThreadPoolExecutor(1) as pool:
        assert text(ask(address, "a")) == "aaa"
        found.may_step.clear()
        running = pool.submit(ask, address, "a", max_tokens=50)
        until(lambda: ready(address)["a"]["active"] == 1)
        refused = ask(address, "b")
        assert refused.status_code == 503
        assert int(refused.headers["Retry-After"]) >= 1
        assert refused.json()["error"]["code"] == "no_memory"
        assert "in use: a" in refused.json()["error"]["message"]
        found.may_step.set()
        assert text(running.result()) == "a" * 50
        until(lambda: found.models["a"].is_idle)
        assert text(ask(address, "b")) == "bbb"  # the refusal is not remembered
        assert states(address) == {"a": "unloaded", "b": "loaded"}


@pytest.mark.parametrize("fault", [QrunError("weights are missing"), RuntimeError("/secret/folder")])
def test_one_that_cannot_be_opened_is_told_and_the_server_lives(served_tokenizer, monkeypatch, fault):
    with house(served_tokenizer, "ab", fit=1) as (found, address):
        assert text(ask(address, "b")) == "bbb"
        found.fault = fault
        for stream in (False, True, True):  # at once again: not opened anew for each
            refused = ask(address, "a", stream=stream)
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "model_not_loaded"
            assert "'a' cannot be loaded" in refused.json()["error"]["message"]
            assert "secret" not in refused.text
        assert found.opened == ["b", "a"]
        assert states(address)["a"] == "failed"
        found.fault = None
        assert text(ask(address, "b")) == "bbb"
        monkeypatch.setattr(models_module, "TRY_AGAIN_SECONDS", 0.0)
        assert text(ask(address, "a")) == "aaa"
        until(lambda: all(served.uses == 0 for served in found.models.values()))


def test_an_idle_model_is_closed_before_a_prompt_is_refused(served_tokenizer):
    """The cache of one model grew beyond the limit, and a prompt was refused while another model lay idle."""
    with house(served_tokenizer, "ab", fit=2) as (found, address):
        assert [text(ask(address, name)) for name in "ab"] == ["aaa", "bbb"]
        long = "x" * (2 * MINIMUM_CAPACITY)
        assert ask(address, "b", messages=[{"role": "user", "content": long}]).status_code == 200
        assert states(address) == {"a": "unloaded", "b": "loaded"}
        assert found.models["b"].engine is not None


def test_a_prompt_beyond_the_limit_is_refused_when_no_other_model_is_idle(served_tokenizer):
    with house(served_tokenizer, "a", fit=1) as (_, address):
        long = "x" * (2 * MINIMUM_CAPACITY)
        refused = ask(address, "a", messages=[{"role": "user", "content": long}])
        assert refused.status_code == 500
        assert "a KV cache of" in refused.json()["error"]["message"]
        assert text(ask(address, "a")) == "aaa"


def test_whoever_goes_away_while_a_model_is_opened_holds_nothing(served_tokenizer):
    with house(served_tokenizer, "ab", fit=1) as (found, address):
        found.may_open.clear()
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(address + CHAT, json={"model": "a", "messages": USER}, timeout=0.2)
        found.may_open.set()
        until(lambda: found.models["a"].state == "loaded" and found.models["a"].uses == 0)
        assert text(ask(address, "b")) == "bbb"


def test_other_routes_open_it_too_and_metrics_tell_each_model(served_tokenizer):
    with house(served_tokenizer, "ab", fit=1) as (_, address):
        asked = {"model": "a", "content": "hi"}
        assert len(httpx.post(f"{address}/tokenize", json=asked, timeout=30).json()["tokens"]) == 2
        count = {"model": "b", "messages": USER}
        assert httpx.post(f"{address}/v1/messages/count_tokens", json=count, timeout=30).status_code == 200
        told = httpx.get(f"{address}/metrics").text
        for line in (
            'qrun_model_loaded{model="a"} 0.0',
            'qrun_model_loaded{model="b"} 1.0',
            'qrun_model_loads{model="a"} 1.0',
            'qrun_model_bytes{model="a"} 0.0',
            f'qrun_model_bytes{{model="b"}} {WEIGHTS:.1f}'.replace("10000000.0", "1e+07"),
            'qrun_model_uses{model="b"} 0.0',
            f'qrun_slots{{model="a"}} {SLOTS}.0',
        ):
            assert line in told


def test_models_come_and_go_under_many_clients(served_tokenizer):
    """Who is refused for memory may come again; everybody else has the answer of the model that was asked."""
    with house(served_tokenizer, "abc", fit=2) as (found, address), ThreadPoolExecutor(8) as pool:

        def client(number: int) -> int:
            refused = 0
            for turn in range(12):
                name = "abc"[(number + turn) % 3]
                response = ask(address, name)
                if response.status_code == 503:
                    assert response.json()["error"]["code"] == "no_memory"
                    refused += 1
                else:
                    assert text(response) == name * 3
            return refused

        answered = 8 * 12 - sum(pool.map(client, range(8)))
        assert answered > 0
        until(lambda: all(served.uses == 0 for served in found.models.values()))
        assert sum(served.engine is not None for served in found.models.values()) <= 2


def test_until_all_are_open_a_server_says_that_it_is_loading(served_tokenizer):
    found = House(served_tokenizer, "ab")
    found.models.lazy = False
    found.may_open.clear()
    with serving(found.models) as address:
        refused = ask(address, "a")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "model_loading")
        assert httpx.get(f"{address}/ready").status_code == 503
        assert httpx.get(f"{address}/health").status_code == 200
        found.may_open.set()
        until(lambda: httpx.get(f"{address}/ready").status_code == 200)
        assert text(ask(address, "a")) == "aaa"
