"""What one request may take: if these fail, one that goes on for ever holds its slot for ever."""

from __future__ import annotations

import json
import socket
import threading
import time

import anthropic
import httpx
import openai
import pytest

from qrun.serve import server
from tests.fakes import fake_manifest, fake_model, repeating
from tests.serve.raw import request
from tests.serve.serving import ready, serving, until

CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "hello"}]
ASKED = {"model": "m", "messages": USER}


@pytest.fixture
def endless(served_tokenizer):
    """Answers "aaa…" for ever, a token in 20 ms."""
    letter = repeating(served_tokenizer, "a")

    def rule(seen):
        time.sleep(0.02)
        return letter(seen)

    return fake_model(served_tokenizer, rule, manifest=fake_manifest(context_length=8192))


def test_an_answer_ends_where_its_time_does_in_every_api(endless):
    with serving({"m": endless}, max_seconds=0.4, slots=2) as address:
        plain = httpx.post(address + CHAT, json=ASKED, timeout=30).json()
        assert plain["choices"][0]["finish_reason"] == "length"
        said = plain["choices"][0]["message"]["content"]
        assert 1 <= len(said) == plain["usage"]["completion_tokens"]
        with openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0) as client:
            chunks = list(client.chat.completions.create(**ASKED, stream=True))
            assert chunks[-1].choices[0].finish_reason == "length"
            assert "".join(each.choices[0].delta.content or "" for each in chunks)
            text = client.completions.create(**{"model": "m", "prompt": "x"})
            assert (text.choices[0].finish_reason, bool(text.choices[0].text)) == ("length", True)
            response = client.responses.create(model="m", input="hello")
            assert response.status == "incomplete"
            assert response.incomplete_details.reason == "max_output_tokens"
        with anthropic.Anthropic(base_url=address, api_key="-", max_retries=0) as client:
            message = client.messages.create(**ASKED, max_tokens=5000)
            assert message.stop_reason == "max_tokens"
            assert message.content[0].text
        until(lambda: ready(address)["m"] == {"slots": 2, "active": 0, "queued": 0})


def test_one_that_is_still_reading_or_waiting_is_refused_and_its_slot_free(served_tokenizer):
    may_read = threading.Event()
    letter = repeating(served_tokenizer, "a")

    def rule(seen):
        assert may_read.wait(20)
        return letter(seen)

    model = fake_model(served_tokenizer, rule, manifest=fake_manifest(context_length=8192))
    with serving({"m": model}, max_seconds=0.3, slots=1) as address:
        found: list[httpx.Response] = []

        def ask(**more) -> None:
            found.append(httpx.post(address + CHAT, json={**ASKED, **more}, timeout=30))

        asking = [threading.Thread(target=ask, kwargs=each) for each in ({}, {"max_tokens": 2})]
        for each in asking:
            each.start()
        until(lambda: ready(address)["m"] == {"slots": 1, "active": 1, "queued": 1})
        time.sleep(0.4)  # the time itself is what is tried
        may_read.set()
        for each in asking:
            each.join()
        # The one whose prompt was read in that very step may have its first token.
        refused = [response for response in found if response.status_code == 504]
        assert refused
        for response in refused:
            assert response.json()["error"]["code"] == "timeout"
            assert "within 0.3 seconds" in response.json()["error"]["message"]
        until(lambda: ready(address)["m"] == {"slots": 1, "active": 0, "queued": 0})
        again = httpx.post(address + CHAT, json={**ASKED, "max_tokens": 2}, timeout=30)
        assert again.json()["choices"][0]["message"]["content"] == "aa"


@pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
def test_a_long_prompt_is_given_up_between_two_pieces(served_tokenizer, path):
    from tests.fakes import FakeSession

    class Reading(FakeSession):
        pieces = 0

        def forward(self, token_ids, cache, logits="last"):
            self.pieces += 1
            time.sleep(0.1)
            return super().forward(token_ids, cache, logits)

    model = fake_model(served_tokenizer, repeating(served_tokenizer, "a"))
    session = model.session = Reading(repeating(served_tokenizer, "a"), fake_manifest(context_length=8192))
    with serving({"m": model}, max_seconds=0.3) as address:
        asked = {"model": "m", "messages": [{"role": "user", "content": "x" * 8000}], "max_tokens": 2}
        refused = httpx.post(address + path, json=asked, timeout=30)
        assert refused.status_code == 504
        kind = {CHAT: "server_error", "/v1/messages": "timeout_error"}[path]
        assert refused.json()["error"]["type"] == kind
        with httpx.stream("POST", address + path, json={**asked, "stream": True}, timeout=30) as response:
            lines = [line for line in response.iter_lines() if line.startswith("data: ")]
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["type"] == kind
        until(lambda: ready(address)["m"]["active"] == 0)
        assert session.pieces < 2 * 8000 // 256, "neither prompt was read to its end"


def test_a_body_that_does_not_come_is_given_up(endless):
    with serving({"m": endless}, max_seconds=0.3) as address:
        host, port = address.removeprefix("http://").split(":")
        whole = request(json.dumps(ASKED))
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(whole[:-5])
            assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")


def test_a_body_that_comes_to_a_halt_is_given_up_without_any_limit_of_time(endless):
    """It held its connection for ever unless --max-seconds was given."""
    with serving({"m": endless}, part_seconds=0.3) as address:
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(request(json.dumps(ASKED))[:-5])
            answered = b""
            while part := connection.recv(4096):
                answered += part
            assert answered.startswith(b"HTTP/1.1 408 ")
            assert b"nothing more of the body" in answered


WHOLE = request(method="GET", path="/health", headers={"Connection": "keep-alive"})


@pytest.mark.parametrize("sent", [b"", b"POST /v1/ch", WHOLE[:-2], WHOLE + WHOLE[:20]], ids=repr)
def test_half_a_head_holds_no_connection(endless, monkeypatch, sent):
    """Any number of them stayed open for as long as their clients liked."""
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.3)
    with serving({"m": endless}) as address:
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(sent)
            answered = b""
            while part := connection.recv(4096):
                answered += part
            assert answered.startswith(b"HTTP/1.1 200 ") == sent.startswith(WHOLE)
        asked = {**ASKED, "stream": True, "max_tokens": 120}  # longer than a head may take, by 20 ms a token
        with httpx.stream("POST", address + CHAT, json=asked, timeout=60) as response:
            assert response.read().endswith(b"[DONE]\n\n")


def test_more_tokens_than_the_server_gives_are_refused_by_name_and_fewer_are_the_default(endless):
    endless.generation_config = {"max_new_tokens": 500}  # the model's own default is no wish of the client
    with serving({"m": endless}, max_tokens=4) as address:
        for path, name, asked in (
            (CHAT, "max_tokens", ASKED),
            ("/v1/completions", "max_tokens", {"model": "m", "prompt": "x"}),
            ("/v1/messages", "max_tokens", ASKED),
            ("/v1/responses", "max_output_tokens", {"model": "m", "input": "x"}),
        ):
            refused = httpx.post(address + path, json={**asked, name: 5})
            assert refused.status_code == 400
            assert "at most 4" in refused.json()["error"]["message"]
            assert refused.json()["error"].get("param", name) == name
        free = httpx.post(address + CHAT, json=ASKED).json()
        assert free["usage"]["completion_tokens"] == 4
        assert free["choices"][0]["finish_reason"] == "length"
        assert httpx.post(address + CHAT, json={**ASKED, "max_tokens": 4}).status_code == 200


def test_the_document_tells_the_limits(endless):
    with serving({"m": endless}, max_tokens=4, max_seconds=2.5) as address:
        told = httpx.get(f"{address}/openapi.json").json()
        assert "at most 4 tokens" in told["info"]["description"]
        assert "2.5 seconds" in told["info"]["description"]
        fields = told["components"]["schemas"]["ChatRequest"]["properties"]
        assert fields["max_tokens"]["maximum"] == fields["max_completion_tokens"]["maximum"] == 4
    with serving({"m": endless}) as address:
        told = httpx.get(f"{address}/openapi.json").json()
        assert "Nothing bounds the time" in told["info"]["description"]
        assert "maximum" not in told["components"]["schemas"]["ChatRequest"]["properties"]["max_tokens"]
