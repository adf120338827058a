"""What a request is refused with, in the shape of OpenAI's API."""

from __future__ import annotations

from typing import Any

from qrun.call import EngineBusyError, EngineClosedError, EngineTimeoutError
from qrun.errors import QrunError
from qrun.sampling.constraint import ComplexFormError

RETRY_SECONDS = 1
# Messages repeat what a client has sent, which may be megabytes.
_MOST_CHARACTERS = 1_000


class ApiError(Exception):
    """A refusal.

    Args:
        status: of HTTP.
        message: one sentence for people.
        param: the field that is wrong, if it is one.
        code: for programs; None where the status says it all.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        self.status, self.code = status, code
        self.message, self.param = _shortened(message), None if param is None else _shortened(param)
        super().__init__(self.message)

    @property
    def headers(self) -> dict[str, str]:
        """The HTTP headers that belong to the status."""
        if self.status in (429, 503):
            return {"Retry-After": str(RETRY_SECONDS)}
        return {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}

    def to_json(self) -> dict[str, Any]:
        """The body of the answer; also what is sent amid a stream."""
        kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def to_anthropic(self) -> dict[str, Any]:
        """The same in the shape of Anthropic's API."""
        kind = {401: "authentication_error", 404: "not_found_error", 413: "request_too_large"}
        kind |= {429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error"}
        found = kind.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
        return {"type": "error", "error": {"type": found, "message": self.message}}

    def body(self, path: str) -> dict[str, Any]:
        """The body in the shape of the API to which a path belongs."""
        return self.to_anthropic() if path.startswith("/v1/messages") else self.to_json()


def _shortened(text: str) -> str:
    part = _MOST_CHARACTERS // 2
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:part]} … {text[-part:]}"


def from_qrun(error: QrunError, *, begun: bool = False) -> ApiError:
    """A ``QrunError`` as a refusal; once an answer has ``begun``, the fault is the server's (500)."""
    if isinstance(error, EngineBusyError):
        return ApiError(429, str(error.what), code="queue_full")
    if isinstance(error, EngineTimeoutError):
        return ApiError(504, str(error.what), code="timeout")
    if isinstance(error, EngineClosedError):
        return ApiError(503, str(error.what), code="closing")
    text = error.what if error.hint is None else f"{error.what} ({error.hint})"
    if isinstance(error, ComplexFormError):
        return ApiError(400, text, code="form_too_complex")
    return ApiError(500 if begun else 400, text)
