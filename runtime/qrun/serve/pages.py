"""The pages for people: files of this package, by a fixed table of addresses."""

from __future__ import annotations

from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
FILES = {
    "/": "index.html",
    "/docs": "docs.html",
    **{
        f"/page/{name}": name
        for name in (
            "style.css",
            "icon.svg",
            "app.js",
            "api.js",
            "store.js",
            "view.js",
            "theme.js",
            "docs.js",
            "vendor/marked.umd.js",
            "vendor/purify.min.js",
        )
    },
}
# A model's text can become HTML only through DOMPurify (trusted types), and a page may load from this server
# and send to it, and to nobody else.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types dompurify"
)


def routes() -> list[Route]:
    """A route for each file, whose content is read now."""
    folder = files("qrun.serve") / "page"
    return [
        _route(path, name, folder.joinpath(*name.split("/")).read_bytes()) for path, name in FILES.items()
    ]


def _route(path: str, name: str, content: bytes) -> Route:
    async def page(request: Request) -> Response:
        headers = {"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"}
        return Response(content, headers=headers, media_type=_KINDS[name.rpartition(".")[2]])

    return Route(path, page, include_in_schema=False)
