"""What TensorRT logs: its errors are kept, since its calls only return False or None when they fail."""

from __future__ import annotations

from typing import Any


def error_log(module: Any) -> Any:
    """A logger for TensorRT whose ``errors`` are the messages of its errors, each on one line.

    Warnings and notices are dropped: they are about TensorRT's own conversions.

    Args:
        module: ``tensorrt`` or ``tensorrt_rtx``, whose class of loggers this is derived from.
    """

    class ErrorLog(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (module.ILogger.ERROR, module.ILogger.INTERNAL_ERROR):
                self.errors.append(" ".join(message.split()))

    return ErrorLog()
