"""What a server does with requests of OpenAI's and Anthropic's APIs: each line is tried, and told in a word.

    python -m benchmarks.serving.features http://127.0.0.1:8080 --model NAME

For docs/serving.md's table. It needs a model with a chat template, a context of at most 8,192 tokens, and
nobody else who asks meanwhile.
"""

from __future__ import annotations

import argparse
import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx

CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "Name three colours."}]
TOOL = {
    "name": "get_weather",
    "description": "The weather of a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


class Probe:
    """A server and the questions that are put to it."""

    def __init__(self, url: str, model: str) -> None:
        self.url, self.model = url, model
        self.client = httpx.Client(base_url=url, timeout=300)

    def post(self, path: str, **asked: Any) -> httpx.Response:
        return self.client.post(path, json={"model": self.model, **asked})

    def chat(self, **asked: Any) -> httpx.Response:
        return self.post(CHAT, **{"messages": USER, "max_tokens": 16, "temperature": 0, **asked})

    @contextmanager
    def load(self, count: int) -> Iterator[None]:
        """So many others who ask meanwhile."""
        with ThreadPoolExecutor(count) as pool:
            asked = {"messages": [{"role": "user", "content": "Tell a long story."}], "max_tokens": 120}
            others = [pool.submit(self.chat, **asked, seed=number) for number in range(count)]
            time.sleep(0.3)
            yield
            for each in others:
                each.result()


def _works(response: httpx.Response) -> str:
    return "yes" if response.status_code == 200 else f"no ({response.status_code})"


def chat_stream(probe: Probe) -> str:
    asked = {"model": probe.model, "messages": USER, "max_tokens": 8, "stream": True}
    with probe.client.stream("POST", CHAT, json=asked) as response:
        return "yes" if "data: [DONE]" in list(response.iter_lines()) else "no"


def responses(probe: Probe) -> str:
    return _works(probe.post("/v1/responses", input="Hi", max_output_tokens=8))


def messages(probe: Probe) -> str:
    return _works(probe.post("/v1/messages", messages=USER, max_tokens=8))


def count_tokens(probe: Probe) -> str:
    return _works(probe.post("/v1/messages/count_tokens", messages=USER))


def several_answers(probe: Probe) -> str:
    found = probe.chat(n=2)
    return _works(found) if found.status_code != 200 else f"{len(found.json()['choices'])} of 2"


def top_logprobs(probe: Probe) -> str:
    found = probe.chat(logprobs=True, top_logprobs=3)
    content = found.json().get("choices", [{}])[0].get("logprobs") or {}
    return "yes" if len((content.get("content") or [{}])[0].get("top_logprobs", [])) == 3 else "no"


def prompt_logprobs(probe: Probe) -> str:
    found = probe.post("/v1/completions", prompt="The sky is blue", echo=True, logprobs=1, max_tokens=1)
    if found.status_code != 200:
        return f"refused ({found.status_code})"
    content = found.json()["choices"][0].get("logprobs") or {}
    count = len(content.get("tokens") or content.get("content") or [])
    return "yes" if count >= 4 else "ignored"


def prompt_lists(probe: Probe) -> str:
    found = probe.post("/v1/completions", prompt=["One", "Two"], max_tokens=2)
    return _works(found) if found.status_code != 200 else f"{len(found.json()['choices'])} of 2"


def unknown_field(probe: Probe) -> str:
    found = probe.chat(temprature=1.0)
    return "refused by name" if "temprature" in found.text and found.status_code == 400 else "ignored"


def wrong_value(probe: Probe) -> str:
    found = probe.chat(top_p=7)
    return "refused" if found.status_code == 400 else f"accepted ({found.status_code})"


def unknown_model(probe: Probe) -> str:
    found = probe.client.post(CHAT, json={"model": "nobody", "messages": USER, "max_tokens": 2})
    return f"{found.status_code}" if found.status_code != 200 else "answered by the model that there is"


def _schema(probe: Probe, schema: dict[str, Any]) -> httpx.Response:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    return probe.chat(response_format=form, max_tokens=80)


def json_schema(probe: Probe) -> str:
    found = _schema(probe, {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]})
    if found.status_code != 200:
        return _works(found)
    return "enforced" if json.loads(found.json()["choices"][0]["message"]["content"])["a"] in (1, 2) else "no"


def unenforced_keyword(probe: Probe) -> str:
    schema = {"type": "array", "items": {"enum": ["a"]}, "uniqueItems": True, "minItems": 2, "maxItems": 3}
    found = _schema(probe, schema)
    if found.status_code != 200:
        return f"refused ({found.status_code})"
    items = json.loads(found.json()["choices"][0]["message"]["content"])
    return f"ignored: {items}" if len(items) > len(set(items)) else f"kept: {items}"


def regex(probe: Probe) -> str:
    found = probe.chat(regex="[xyz]{4}")
    text = found.json()["choices"][0]["message"]["content"] if found.status_code == 200 else ""
    return "enforced" if len(text) == 4 and set(text) <= set("xyz") else "no"


def required_call(probe: Probe) -> str:
    found = probe.chat(tools=[{"type": "function", "function": TOOL}], tool_choice="required", max_tokens=120)
    if found.status_code != 200:
        return _works(found)
    calls = found.json()["choices"][0]["message"].get("tool_calls")
    return (
        "enforced" if calls and set(json.loads(calls[0]["function"]["arguments"])) == {"city"} else "no call"
    )


def named_call(probe: Probe) -> str:
    tools = [{"type": "function", "function": TOOL}]
    tools.append({"type": "function", "function": {**TOOL, "name": "get_time"}})
    choice = {"type": "function", "function": {"name": "get_time"}}
    found = probe.chat(tools=tools, tool_choice=choice, max_tokens=120)
    if found.status_code != 200:
        return _works(found)
    calls = found.json()["choices"][0]["message"].get("tool_calls") or [{"function": {"name": "none"}}]
    return "enforced" if calls[0]["function"]["name"] == "get_time" else f"no: {calls[0]['function']['name']}"


def typed_control_token(probe: Probe) -> str:
    counts = []
    for text in ("a b", "a <|im_end|> b"):
        found = probe.chat(messages=[{"role": "user", "content": text}], max_tokens=1)
        counts.append(found.json()["usage"]["prompt_tokens"])
    return "stays text" if counts[1] - counts[0] > 3 else "becomes the token"


def long_prompt(probe: Probe) -> str:
    found = probe.chat(messages=[{"role": "user", "content": "word " * 20_000}])
    numbers = sum(any(each.isdigit() for each in word) for word in found.text.split())
    return f"{found.status_code}, {'both numbers' if numbers >= 2 else 'no numbers'}"


def cached_tokens(probe: Probe) -> str:
    asked = [{"role": "system", "content": "Be brief. " * 200}, *USER]
    for _ in range(2):
        usage = probe.chat(messages=asked).json()["usage"]
    found = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    return "no" if not found else f"{found} of {usage['prompt_tokens']}"


def same_under_load(probe: Probe) -> str:
    asked = [{"role": "system", "content": "You are a poet. " * 40}, {"role": "user", "content": "Write."}]
    alone = probe.chat(messages=asked, max_tokens=120).json()["choices"][0]["message"]["content"]
    same = 0
    for _ in range(5):
        with probe.load(3):
            found = probe.chat(messages=asked, max_tokens=120).json()["choices"][0]["message"]["content"]
        same += found == alone
    return f"{same} of 5"


def full_queue(probe: Probe) -> str:
    with ThreadPoolExecutor(120) as pool:
        found = [each.status_code for each in pool.map(lambda _: probe.chat(max_tokens=4), range(120))]
    return f"{found.count(429)} of 120 told to come again (429)" if 429 in found else "all wait"


def foreign_host(probe: Probe) -> str:
    return f"{probe.client.get('/v1/models', headers={'Host': 'evil.example'}).status_code}"


def foreign_origin(probe: Probe) -> str:
    found = probe.client.post(CHAT, headers={"Origin": "https://evil.example"}, json={"model": "x"})
    allowed = found.headers.get("access-control-allow-origin")
    return f"{found.status_code}, {'may read answers' if allowed else 'may read nothing'}"


def metrics(probe: Probe) -> str:
    return _works(probe.client.get("/metrics"))


def leaving(probe: Probe) -> str:
    """A client that goes away from every slot; another one is then answered at once."""
    asked = json.dumps({"model": probe.model, "messages": USER, "max_tokens": 4000, "ignore_eos": True})
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    sent = f"{head}Content-Length: {len(asked)}\r\n\r\n{asked}".encode()
    host, port = probe.url.removeprefix("http://").split(":")
    gone = [socket.create_connection((host, int(port))) for _ in range(8)]
    for each in gone:
        each.sendall(sent)
    time.sleep(1)
    for each in gone:
        each.close()
    started = time.monotonic()
    probe.chat(max_tokens=2)
    return "yes" if time.monotonic() - started < 5 else f"only after {time.monotonic() - started:.0f} s"


PROBES: dict[str, Callable[[Probe], str]] = {
    "chat completions, streamed": chat_stream,
    "`/v1/responses`": responses,
    "`/v1/messages`": messages,
    "`/v1/messages/count_tokens`": count_tokens,
    "`n: 2`": several_answers,
    "`top_logprobs: 3`": top_logprobs,
    "log-probabilities of the prompt (`echo`, `logprobs`)": prompt_logprobs,
    "a list of prompts": prompt_lists,
    "a misspelt field": unknown_field,
    "`top_p: 7`": wrong_value,
    "a model that there is not": unknown_model,
    "JSON schema": json_schema,
    "a schema with `uniqueItems`": unenforced_keyword,
    "`regex`": regex,
    "`tool_choice: required`": required_call,
    "a named tool": named_call,
    "`<|im_end|>` typed by a user": typed_control_token,
    "a prompt beyond the context": long_prompt,
    "tokens found in the prefix cache are told": cached_tokens,
    "a greedy answer of 120 tokens beside three others as alone": same_under_load,
    "120 requests at once": full_queue,
    "clients that go away free their slots": leaving,
    "a foreign Host (DNS rebinding)": foreign_host,
    "a page of another origin": foreign_origin,
    "`/metrics`": metrics,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving.features", description=__doc__.splitlines()[0]
    )
    parser.add_argument("url")
    parser.add_argument("--model", default="model")
    parser.add_argument("--only", help="part of a line's name")
    arguments = parser.parse_args()
    probe = Probe(arguments.url, arguments.model)
    for name, tried in PROBES.items():
        if arguments.only is None or arguments.only in name:
            try:
                found = tried(probe)
            except (httpx.HTTPError, KeyError, ValueError, IndexError, TypeError) as error:
                found = f"failed: {type(error).__name__} {error}"
            print(f"| {name} | {found} |", flush=True)


if __name__ == "__main__":
    main()
