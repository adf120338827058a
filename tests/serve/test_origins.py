"""Pages of other origins and other names for this machine reach nothing; /openapi.json knows every route."""

from __future__ import annotations

import httpx
import pytest
from starlette.routing import Route

from qrun.errors import QrunError
from qrun.serve import openapi, pages
from qrun.serve.guard import read_host, read_origin
from tests.fakes import fake_model
from tests.serve.serving import serving

PATHS = ("/", "/docs", "/health", "/ready", "/metrics", "/openapi.json", "/v1/models", "/page/app.js")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "localhost.evil.example", "127.0.0.1.nip.io", ""]
)
def test_a_name_that_is_turned_to_this_machine_is_refused_everywhere(address, path, host):
    assert httpx.get(address + path, headers={"Host": host}).status_code == 421


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:80", "127.0.0.1:1", "[::1]:8080", "10.0.0.7", "a.localhost."]
)
def test_names_of_this_machine_and_addresses_are_its_own(address, host):
    assert httpx.get(f"{address}/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "http://localhost"])
@pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions", "/"])
def test_pages_of_other_origins_are_refused_with_whatever_method(address, origin, path):
    for method in ("GET", "POST", "OPTIONS"):
        found = httpx.request(method, address + path, headers={"Origin": origin}, content=b"{}")
        assert found.status_code == 403
        assert "access-control-allow-origin" not in found.headers


def test_the_own_origin_may_ask_also_behind_a_proxy_with_tls(address):
    host = address.partition("//")[2]
    for scheme in ("http", "https"):
        assert httpx.get(f"{address}/v1/models", headers={"Origin": f"{scheme}://{host}"}).status_code == 200


def test_a_named_origin_may_ask_and_a_named_host_is_its_own(served_tokenizer):
    models = {"m": fake_model(served_tokenizer, lambda seen: 0)}
    origin = "https://chat.example"
    with serving(models, keys=("k",), origins=(origin,), names=("llm.example",)) as address:
        ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        found = httpx.options(f"{address}/v1/chat/completions", headers={"Origin": origin, **ask})
        assert (found.status_code, found.headers["access-control-allow-origin"]) == (200, origin)
        for key, status in (("k", 200), ("x", 401)):  # a refusal can be read too
            found = httpx.get(
                f"{address}/v1/models", headers={"Origin": origin, "Authorization": f"Bearer {key}"}
            )
            assert (found.status_code, found.headers["access-control-allow-origin"]) == (status, origin)
        assert (
            httpx.get(
                f"{address}/v1/models", headers={"Origin": "https://b.example", "x-api-key": "k"}
            ).status_code
            == 403
        )
        assert httpx.get(f"{address}/health", headers={"Host": "LLM.example:443"}).status_code == 200


@pytest.mark.parametrize(
    "text", ["*", "chat.example", "https://", "https://a.example/path", "https://u@a.example"]
)
def test_an_origin_that_is_none_is_refused(text):
    with pytest.raises(QrunError, match="not an origin"):
        read_origin(text)


@pytest.mark.parametrize("text", ["http://a.example", "*", "", "a.example/b"])
def test_a_host_that_is_none_is_refused(text):
    with pytest.raises(QrunError, match="not a host"):
        read_host(text)


def test_pages_have_a_strict_policy_and_need_no_key(served_tokenizer):
    with serving({"m": fake_model(served_tokenizer, lambda seen: 0)}, keys=("k",)) as address:
        for path in pages.FILES:
            found = httpx.get(address + path)
            assert found.status_code == 200
            assert found.headers["content-security-policy"] == pages.POLICY
            assert found.headers["x-content-type-options"] == "nosniff"
        assert "unsafe" not in pages.POLICY
        for path in ("/page/", "/page/../app.py", "/page/%2e%2e/app.py", "/page/vendor/LICENSE.marked"):
            assert httpx.get(address + path, headers={"x-api-key": "k"}).status_code == 404


def test_the_document_has_every_route_and_a_new_one_cannot_be_forgotten(address):
    found = httpx.get(f"{address}/openapi.json").json()
    assert set(found["paths"]) == set(openapi.DESCRIBED)
    chat = found["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"messages", "temperature", "stream_options"} <= set(chat)
    assert chat["user"]["description"] == "Accepted, and changes nothing."
    assert list(chat).index("user") > list(chat).index("messages")
    assert chat["model"]["enum"] == ["echo", "long", "base"]
    assert chat["messages"]["items"]["required"] == ["role"]
    stream = found["paths"]["/v1/messages"]["post"]["responses"]["200"]["content"]["text/event-stream"]
    assert set(stream["schema"]["properties"]) == {"event", "data"}
    with pytest.raises(KeyError, match="/new"):
        openapi.document([Route("/new", lambda request: None)], "1", [])
