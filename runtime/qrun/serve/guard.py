"""Protection against web pages of other origins, which could reach this server through a user's browser."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.types import Scope

from qrun.errors import QrunError
from qrun.serve.errors import ApiError

# Headers of every answer; the pages for people have a Content-Security-Policy as well.
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"x-frame-options", b"DENY"),
)


def check(scope: Scope, names: Collection[str], origins: Collection[str]) -> None:
    """Refuse a request that a page of another origin may have caused.

    A Host that is an IP address is always accepted. In an attack by DNS rebinding a page's own name is
    pointed at this machine; the browser sends that name as Host, and it is refused unless ``names`` holds it.

    Args:
        scope: the request.
        names: hosts beside "localhost" and addresses, in lower case.
        origins: those beside the server's own.

    Raises:
        ApiError: 421 for a foreign Host, 403 for a foreign Origin.
    """
    hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
    for host in hosts:
        name = _name(host)
        if not (name == "localhost" or name.endswith(".localhost") or name in names or _is_address(name)):
            text = (
                f"this server is not called {name!r}: start it with --allowed-host {name or 'NAME'} if it is"
            )
            raise ApiError(421, text, code="unknown_host")
    for origin in (value.decode("latin-1") for name, value in scope["headers"] if name == b"origin"):
        own = [f"{scheme}://{host}".lower() for host in hosts for scheme in ("http", "https")]
        if origin.lower() not in own and origin.lower() not in origins:
            text = (
                f"pages of {origin} may not ask this server: start it with --cors-origin {origin} if they may"
            )
            raise ApiError(403, text, code="unknown_origin")


def read_origin(text: str) -> str:
    """An origin as browsers send it.

    Raises:
        QrunError: the text is not an origin.
    """
    parts = urlsplit(text)
    found = f"{parts.scheme}://{parts.netloc}".lower()
    if not parts.scheme or not parts.netloc or "@" in parts.netloc or text.lower().rstrip("/") != found:
        raise QrunError(
            f"{text} is not an origin", hint="give SCHEME://HOST[:PORT], such as https://chat.example"
        )
    return found


def read_host(text: str) -> str:
    """A host's name without its port, in lower case.

    Raises:
        QrunError: the text is not a host's name.
    """
    name = _name(text)
    if not name or any(each in text for each in "/*@ ,"):
        raise QrunError(
            f"{text} is not a host's name", hint="give a name such as chat.example, without http://"
        )
    return name


def _name(host: str) -> str:
    """The name in a Host header: without port, brackets and the dot at the end."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return (host.partition(":")[0] if host.count(":") == 1 else host).rstrip(".").lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
