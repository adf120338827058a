"""Several callers: each is answered as if alone, none holds up the others, and nothing of them is left."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

import qrun
from qrun.engine import Engine
from qrun.serve.models import Models
from qrun.text.chat_template import ChatTemplate
from qrun.text.tokenizer import Tokenizer
from tests.fakes import FakeSession, fake_manifest, fake_model, repeating
from tests.serve.serving import metric, ready, serving, until

USER = [{"role": "user", "content": "hello"}]
CHAT = "/v1/chat/completions"
# Of the eight prompts; a letter is a token, so the last three have several pieces and begin alike.
WORDS = (1, 4, 7, 10, 13, 60, 90, 150)


def slowly(rule, seconds=0.01):
    def wait(seen):
        time.sleep(seconds)
        return rule(seen)

    return wait


@pytest.fixture
def endless(served_tokenizer):
    """Answers for ever, one token in some milliseconds."""
    rule = slowly(repeating(served_tokenizer, "abc"), 0.003)
    return fake_model(served_tokenizer, rule, manifest=fake_manifest(context_length=4096))


def ask(client: openai.OpenAI, number: int, **more) -> tuple[str, str]:
    found = client.chat.completions.create(
        model="m",
        messages=[{"role": "user", "content": "word " * WORDS[number]}],
        max_tokens=5 + number,
        seed=number,
        temperature=1.5,
        extra_body={"ignore_eos": True},
        **more,
    )
    return found.choices[0].message.content, found.choices[0].finish_reason


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_eight_seeded_requests_are_each_answered_as_alone_while_others_come_and_go(exporter, precision):
    model = qrun.open(exporter(precision, max_position_embeddings=1024), threads=1)
    with serving({"m": model}, slots=6, prefix_bytes=1 << 24) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0)
        alone = [ask(client, number) for number in range(8)]
        over = threading.Event()

        def disturb() -> None:
            while not over.is_set():
                asked = {"model": "m", "messages": USER, "stream": True, "max_tokens": 50}
                with httpx.stream("POST", address + CHAT, json=asked) as response:
                    next(response.iter_lines())  # and away
                httpx.post(address + CHAT, json={**asked, "stream": False, "max_tokens": 3})

        disturbers = [threading.Thread(target=disturb) for _ in range(3)]
        for each in disturbers:
            each.start()
        with ThreadPoolExecutor(8) as pool:
            for _ in range(3):
                assert list(pool.map(lambda number: ask(client, number), range(8))) == alone
        over.set()
        for each in disturbers:
            each.join()
        until(lambda: ready(address)["m"] == {"slots": 6, "active": 0, "queued": 0})
        assert metric(address, "qrun_prefix_cache_hit_tokens") > 0


def test_a_client_that_goes_away_gives_its_slot_back(endless):
    with serving({"m": endless}, slots=1) as address:
        asked = {"model": "m", "messages": USER}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(address + CHAT, json=asked, timeout=0.2)
        until(lambda: ready(address)["m"]["active"] == 0)
        with httpx.stream("POST", address + CHAT, json={**asked, "stream": True}) as response:
            next(response.iter_lines())
        until(lambda: ready(address)["m"]["active"] == 0)
        short = {"model": "m", "messages": USER, "max_tokens": 3}
        assert httpx.post(address + CHAT, json=short).status_code == 200


def test_a_full_queue_says_when_to_come_again(endless):
    with serving({"m": endless}, slots=1, queue=1) as address, ThreadPoolExecutor(2) as pool:
        asked = {"model": "m", "messages": USER, "max_tokens": 300}
        running = [pool.submit(httpx.post, address + CHAT, json=asked, timeout=60) for _ in range(2)]
        until(lambda: ready(address)["m"] == {"slots": 1, "active": 1, "queued": 1})
        refused = httpx.post(address + CHAT, json=asked)
        assert refused.status_code == 429
        assert int(refused.headers["Retry-After"]) >= 1
        assert [each.result().status_code for each in running] == [200, 200]


def test_a_reader_who_is_slow_holds_up_nobody(endless):
    with serving({"m": endless}, slots=2) as address:
        asked = {"model": "m", "messages": USER, "stream": True, "max_tokens": 3000}
        with httpx.stream("POST", address + CHAT, json=asked) as response:
            next(response.iter_raw(64))  # and reads no more
            short = {"model": "m", "messages": USER, "max_tokens": 20}
            started = time.monotonic()
            assert httpx.post(address + CHAT, json=short).status_code == 200
            assert time.monotonic() - started < 5


def test_one_key_that_asks_much_does_not_make_another_wait_for_all_of_it(endless):
    with (
        serving({"m": endless}, slots=1, keys=("much", "little")) as address,
        ThreadPoolExecutor(12) as pool,
    ):
        ended: list[str] = []

        def post(key: str) -> None:
            asked = {"model": "m", "messages": USER, "max_tokens": 40}
            headers = {"Authorization": f"Bearer {key}"}
            assert httpx.post(address + CHAT, json=asked, headers=headers, timeout=60).status_code == 200
            ended.append(key)

        much = [pool.submit(post, "much") for _ in range(8)]
        until(lambda: ready(address)["m"]["queued"] == 7)
        little = pool.submit(post, "little")
        for each in (*much, little):
            each.result()
        assert ended.index("little") <= 4  # without turns it is the last of nine


def test_a_long_system_message_is_read_once_for_all_who_begin_with_it(served_tokenizer):
    """Of the second request less than a tenth is read, so it waits less than a tenth of the time."""
    rule = repeating(served_tokenizer, "x")
    model = fake_model(served_tokenizer, rule, manifest=fake_manifest(context_length=4096))
    session = model.session = FakeSession(rule, model.manifest)
    engine = Engine(model, prefix_bytes=1 << 26)
    with serving(Models.of({"m": engine})) as address:
        counts = []
        for question in ("why?", "how?", "when?"):
            system = {"role": "system", "content": "a rule. " * 250}
            asked = {"model": "m", "messages": [system, {"role": "user", "content": question}]}
            session.fed.clear()
            found = httpx.post(address + CHAT, json={**asked, "max_tokens": 1}, timeout=60).json()["usage"]
            counts.append(sum(map(len, session.fed)))
            assert found["prompt_tokens"] - found["prompt_tokens_details"]["cached_tokens"] == counts[-1]
        assert counts[0] > 2000
        assert max(counts[1:]) < counts[0] / 10


def test_a_step_that_fails_ends_the_answers_in_it_and_not_the_server(served_tokenizer):
    (mark,) = served_tokenizer.encode("!")

    class Failing(FakeSession):
        def forward(self, token_ids, cache, logits="last"):
            if mark in token_ids:
                raise RuntimeError("a fault of ours")
            return super().forward(token_ids, cache, logits)

    model = fake_model(served_tokenizer, repeating(served_tokenizer, "x"))
    model.session = Failing(repeating(served_tokenizer, "x"))
    with serving({"m": model}) as address:
        asked = {"model": "m", "messages": USER, "max_tokens": 3}
        broken = {**asked, "messages": [{"role": "user", "content": "hello!"}]}
        failed = httpx.post(address + CHAT, json=broken)
        assert failed.status_code == 500
        assert "could not be completed" in failed.json()["error"]["message"]
        with httpx.stream("POST", address + CHAT, json={**broken, "stream": True}) as response:
            text = response.read().decode()
        assert '"server_error"' in text
        assert "Traceback" not in text
        assert httpx.post(address + CHAT, json=asked).status_code == 200
        assert ready(address)["m"]["active"] == 0


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/tokenize", {"content": "hello"}),
        ("/detokenize", {"tokens": [65, 66]}),
        ("/apply-template", {"messages": USER}),
        (CHAT, {"messages": USER, "max_tokens": 1}),
        ("/v1/completions", {"prompt": "hello", "max_tokens": 1}),
        ("/v1/responses", {"input": "hello", "max_output_tokens": 1}),
        ("/v1/messages", {"messages": USER, "max_tokens": 1}),
        ("/v1/messages/count_tokens", {"messages": USER}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_work_on_a_long_text_holds_up_nobody(served_tokenizer, monkeypatch, path, asked):
    """Three routes did it on the event loop: a text of some megabytes stopped all streams for seconds."""
    reached, go = threading.Event(), threading.Event()

    def waiting(original):
        def work(*arguments, **options):
            reached.set()
            assert go.wait(10), "the server was held up"
            return original(*arguments, **options)

        return work

    model = fake_model(served_tokenizer, repeating(served_tokenizer, "x"))
    with serving({"m": model}) as address, ThreadPoolExecutor(1) as pool:
        for kind, name in ((Tokenizer, "encode"), (Tokenizer, "decode"), (ChatTemplate, "render")):
            monkeypatch.setattr(kind, name, waiting(getattr(kind, name)))
        long = pool.submit(httpx.post, address + path, json={"model": "m", **asked}, timeout=20)
        assert reached.wait(10)
        assert httpx.get(f"{address}/health", timeout=5).status_code == 200
        go.set()
        assert long.result().status_code == 200
