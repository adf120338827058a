"""Requests as bytes, and what a server answers to them over a socket."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass

CHAT = "/v1/chat/completions"
GOOD = {"model": "echo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


@dataclass(frozen=True)
class Answered:
    """What came back until the server closed the connection."""

    status: int
    body: bytes
    statuses: int

    @property
    def message(self) -> str:
        """The one that a client shows: the error's, or the text where the request was no HTTP."""
        try:
            return str(json.loads(self.body)["error"]["message"])
        except ValueError:
            return self.body.decode()


def request(
    body: bytes | str = b"",
    *,
    method: str = "POST",
    path: str = CHAT,
    headers: Mapping[str, str] | None = None,
    length: int | str | None = None,
) -> bytes:
    """One request that asks the server to close the connection after it."""
    content = body.encode() if isinstance(body, str) else body
    given = {"Host": "localhost", "Connection": "close", "Content-Type": "application/json"}
    given |= {"Content-Length": str(len(content) if length is None else length), **(headers or {})}
    head = "".join(f"{name}: {value}\r\n" for name, value in given.items() if value)
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + content


def chunked(*chunks: bytes, path: str = CHAT) -> bytes:
    """One request whose body comes in chunks, as they are given."""
    head = request(path=path, headers={"Content-Length": "", "Transfer-Encoding": "chunked"})
    return head + b"".join(chunks)


def chunk(content: bytes) -> bytes:
    """One chunk; an empty one is the last."""
    return f"{len(content):x}\r\n".encode() + content + b"\r\n"


def send(address: str, sent: bytes, *, close: bool = False) -> Answered:
    """Send bytes, and with ``close`` say that no more come; then read until the server has closed."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        try:
            connection.sendall(sent)
            if close:
                connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it has refused the request before reading all of it
        parts: list[bytes] = []
        try:
            while part := connection.recv(65_536):
                parts.append(part)
        except ConnectionResetError:
            pass
    whole = b"".join(parts)
    head, _, body = whole.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" in head.lower():
        size, _, body = body.partition(b"\r\n")
        body = body[: int(size, 16)]
    return Answered(int(head[9:12] or 0), body, whole.count(b"HTTP/1.1 "))
