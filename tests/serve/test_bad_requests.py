"""Bad input below the fields: one status, one message, and no fault in the log, over real sockets.

test_refusals.py goes through the fields.
"""

from __future__ import annotations

import gzip
import json
import logging
import re
import socket

import httpx
import pytest

from qrun.serve import handlers
from tests.fakes import REPOSITORY
from tests.serve import test_other_tool_refusals, test_refusals, test_tools
from tests.serve.raw import CHAT, GOOD, chunk, chunked, request, send

TEXT = json.dumps(GOOD)
ASKED = '{"model": "echo", "max_tokens": 2, "messages": [{"role": "user", "content": %s}]}'


def deep(opening: str, closing: str, depth: int = 5_000) -> str:
    return opening * depth + closing * depth


# name: bytes, status, a part of the message
NO_HTTP = {
    "garbage": (b"garbage\r\n\r\n", 400, "Invalid HTTP"),
    "a TLS hello": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64), 400, "Invalid HTTP"),
    "HTTP/0.9": (b"GET /health\r\n\r\n", 400, "Invalid HTTP"),
    "a version that is none": (b"GET /health HTTP/x\r\nHost: localhost\r\n\r\n", 400, "Invalid HTTP"),
    "a method with a blank": (b"GE T /health HTTP/1.1\r\nHost: localhost\r\n\r\n", 400, "Invalid HTTP"),
    "no host": (b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n", 400, "Invalid HTTP"),
    "a header without a colon": (
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX\r\n\r\n",
        400,
        "Invalid HTTP",
    ),
    "a blank in a header's name": (
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX Y: 1\r\n\r\n",
        400,
        "Invalid HTTP",
    ),
    "a zero byte in a header": (
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: a\0b\r\n\r\n",
        400,
        "Invalid HTTP",
    ),
    "a header of 200,000 letters": (request(TEXT, headers={"X": "a" * 200_000}), 400, "Invalid HTTP"),
    "50,000 headers": (request(TEXT, headers={f"X-{i}": "a" for i in range(50_000)}), 400, "Invalid HTTP"),
    "a path of 200,000 letters": (request(method="GET", path="/" + "a" * 200_000), 400, "Invalid HTTP"),
    "a length below zero": (request(TEXT, length=-5), 400, "Invalid HTTP"),
    "a length that is no number": (request(TEXT, length="five"), 400, "Invalid HTTP"),
    "two lengths": (
        request(TEXT).replace(b"\r\n\r\n", b"\r\nContent-Length: 6\r\n\r\n"),
        400,
        "Invalid HTTP",
    ),
    "a chunk whose size is no number": (chunked(b"zz\r\n"), 400, None),
    "a transfer encoding that is unknown": (
        request(TEXT, headers={"Transfer-Encoding": "compress", "Content-Length": ""}),
        (400, 501),
        "Invalid HTTP",
    ),
}
BODIES = {
    "nothing": (request(), 400, "not JSON"),
    "an opening brace": (request("{"), 400, "not JSON"),
    "a list": (request("[]"), 400, "expected `object`"),
    "null": (request("null"), 400, "expected `object`"),
    "a number": (request("7"), 400, "expected `object`"),
    "a string": (request('"x"'), 400, "expected `object`"),
    "words": (request("hello"), 400, "not JSON"),
    "single quotes": (request(TEXT.replace('"', "'")), 400, "not JSON"),
    "a trailing comma": (request(TEXT[:-1] + ",}"), 400, "not JSON"),
    "a comment": (request("// hi\n" + TEXT), 400, "not JSON"),
    "two objects": (request(TEXT + TEXT), 400, "not JSON"),
    "NaN": (request(TEXT[:-1] + ', "temperature": NaN}'), 400, "not JSON"),
    "Infinity": (request(TEXT[:-1] + ', "temperature": Infinity}'), 400, "not JSON"),
    "a number beyond all": (request(TEXT[:-1] + ', "temperature": 1e999}'), 400, ""),
    "a whole number of 5,000 digits": (request(TEXT[:-1] + ', "seed": ' + "9" * 5_000 + "}"), 400, ""),
    "a form": (request("model=echo&messages=hi"), 400, "not JSON"),
    "parts of a form": (
        request("--x\r\nContent-Disposition: form-data; name=a\r\n\r\n1\r\n--x--\r\n"),
        400,
        "not JSON",
    ),
    "UTF-16": (request(TEXT.encode("utf-16")), 400, "not JSON"),
    "UTF-32": (request(TEXT.encode("utf-32")), 400, "not JSON"),
    "Latin-1": (request((ASKED % '"caf\xe9"').encode("latin-1")), 400, ""),
    "bytes that are no UTF-8": (request((ASKED % '"x"').encode().replace(b"x", b"\xff\xfe")), 400, ""),
    "half a surrogate pair": (request(ASKED % '"\\ud800"'), 400, ""),
    "a byte order mark": (request(TEXT.encode("utf-8-sig")), 400, "not JSON"),
    "a body that is compressed": (
        request(gzip.compress(TEXT.encode()), headers={"Content-Encoding": "gzip"}),
        400,
        "",
    ),
    "zero bytes": (request(bytes(100)), 400, "not JSON"),
    "a control character in a string": (request(ASKED % '"a\x01b"'), 400, "not JSON"),
    "200,000 brackets": (request("[" * 200_000), 400, ""),
    "200,000 braces": (request('{"a":' * 200_000), 400, ""),
    "a content of 5,000 lists": (request(ASKED % deep("[", "]")), 400, ""),
    "a field of 5,000 objects": (
        request(TEXT[:-1] + ', "x": ' + '{"a":' * 5_000 + "1" + "}" * 5_001),
        400,
        "",
    ),
    "a schema of 5,000 levels": (
        request(
            TEXT[:-1]
            + ', "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": '
            + '{"items":' * 5_000
            + "{}"
            + "}" * 5_003
        ),
        400,
        "",
    ),
    "metadata of 5,000 levels": (request(TEXT[:-1] + ', "metadata": ' + deep("[", "]") + "}"), 400, ""),
    "a body of 9 MB": (request("x" * (9 << 20)), 413, "larger than 8,388,608 bytes"),
    "chunks of 9 MB": (
        chunked(*[chunk(b"x" * (1 << 20))] * 9, chunk(b"")),
        413,
        "larger than 8,388,608 bytes",
    ),
}
ROUTES = {
    "an unknown route": (request(method="GET", path="/nothing"), 404, "there is no /nothing"),
    "half a route": (request(method="GET", path="/v1"), 404, "there is no /v1"),
    "an unknown API": (request(TEXT, path="/v1/embeddings"), 404, "there is no /v1/embeddings"),
    "two slashes": (request(TEXT, path="//v1/chat/completions"), 404, "there is no"),
    "capitals": (request(TEXT, path="/V1/Chat/Completions"), 404, "there is no"),
    "a zero byte in the path": (request(method="GET", path="/v1/models/%00"), 404, "there is no"),
    "a path upwards": (request(method="GET", path="/v1/models/../../etc/passwd"), 404, "there is no"),
    "a path upwards in escapes": (
        request(method="GET", path="/%2e%2e/%2e%2e/etc/passwd"),
        404,
        "there is no",
    ),
    "no UTF-8 in the path": (request(method="GET", path="/v1/models/%ff"), 404, "there is no"),
    "another server's address": (request(method="GET", path="http://example.com/x"), (400, 404), ""),
    "GET where POST belongs": (request(method="GET"), 405, "GET is not allowed here"),
    "PUT": (request(TEXT, method="PUT"), 405, "PUT is not allowed here"),
    "DELETE": (request(method="DELETE", path="/v1/models/echo"), 405, "DELETE is not allowed here"),
    "a method that nobody knows": (request(TEXT, method="BREW"), 405, "BREW is not allowed here"),
    "POST where GET belongs": (request(TEXT, path="/v1/models"), 405, "POST is not allowed here"),
    "CONNECT": (request(method="CONNECT", path="example.com:443"), (400, 404, 405), ""),
    "a foreign host": (request(TEXT, headers={"Host": "evil.example"}), 421, "is not called 'evil.example'"),
    "a foreign origin": (request(TEXT, headers={"Origin": "https://evil.example"}), 403, "may not ask"),
}
KINDS = {**NO_HTTP, **BODIES, **ROUTES}


@pytest.mark.parametrize("name", KINDS)
def test_one_status_and_one_message(address, caplog, name):
    sent, status, message = KINDS[name]
    caplog.set_level(logging.INFO)
    found = send(address, sent)
    assert found.status in (status if isinstance(status, tuple) else (status,)), found
    assert found.statuses == 1
    assert found.message
    assert (message or "") in found.message
    assert "\n" not in found.message.strip()
    assert not [record for record in caplog.records if record.exc_info or record.levelno >= logging.ERROR]
    assert httpx.get(f"{address}/health").status_code == 200


HALVES = {
    "nothing at all": b"",
    "half a line": b"POST /v1/chat",
    "half the headers": request(TEXT)[:60],
    "half the body": request(TEXT)[:-10],
    "no body where one is announced": request(length=500),
    "half a chunk": chunked(b"ff\r\n{"),
    "chunks without the last one": chunked(chunk(TEXT.encode())),
    "half a size of a chunk": chunked(b"f"),
}


@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize("closes", [True, False], ids=["the writing side closed", "gone"])
def test_half_a_request_leaves_nothing_behind(address, caplog, name, closes):
    caplog.set_level(logging.INFO)
    host, port = address.removeprefix("http://").split(":")
    if closes:
        assert send(address, HALVES[name], close=True).status in (0, 400)
    else:
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(HALVES[name])
    assert httpx.post(address + CHAT, json=GOOD).status_code == 200
    assert not [record for record in caplog.records if record.exc_info or record.levelno >= logging.ERROR]
    assert httpx.get(f"{address}/ready").json()["models"]["echo"]["active"] == 0


def test_a_fault_of_the_server_would_be_seen(address, caplog, monkeypatch):
    """Otherwise the looks into the log would show nothing."""
    monkeypatch.setattr(handlers, "decode", lambda *_: 1 / 0)
    found = send(address, request(TEXT))
    assert (found.status, found.message) == (500, "the server has a fault; its log says more")
    assert [record for record in caplog.records if record.exc_info]


def test_the_docs_count_the_kinds_of_bad_input():
    tables = [KINDS, HALVES, test_refusals.FIELDS, test_refusals.CLAUDES, test_refusals.RESPONSES]
    tables += [test_refusals.MISSING, test_tools.REFUSED, test_other_tool_refusals.RESPONSES_REFUSED]
    tables += [test_other_tool_refusals.MESSAGES_REFUSED]
    page = (REPOSITORY / "docs" / "serving.md").read_text(encoding="utf-8")
    (counted,) = re.findall(r"(\d+) kinds of bad input", page)
    assert int(counted) == sum(map(len, tables))
