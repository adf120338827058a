"""How ONNX Runtime's attention reads a prompt on the CPU, and how many tokens it may be given at once.

``GroupQueryAttention`` has two ways (since 1.28): a whole matrix of scores, or tiles of it ("flash
attention", its default for several tokens). Up to some thousand tokens the matrix takes half to four
fifths of the time (256 tokens of a 0.5B model's layer: 1.4 ms for 2.8, behind 1,792 others 9.2 for 11.8;
behind 8,000 both are alike). Its memory grows with the context, so that far behind the beginning fewer
tokens go at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

# Read by ONNX Runtime while it makes a session's kernels.
_SWITCH = "ORT_GQA_DISABLE_FLASH_ATTENTION"
_MOST_SCORE_BYTES = 64 << 20
_LEAST_TOKENS = 64  # matrix products of fewer are slow


class _Switch:
    """It is the process's own, and several threads may be opening sessions: the last one puts it back."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._openings = 0
        self._ours = False

    def set(self) -> None:
        with self._lock:
            if self._openings == 0 and _SWITCH not in os.environ:
                os.environ[_SWITCH] = "1"
                self._ours = True
            self._openings += 1

    def put_back(self) -> None:
        with self._lock:
            self._openings -= 1
            if self._openings == 0 and self._ours:
                os.environ.pop(_SWITCH, None)
                self._ours = False


_switch = _Switch()


@contextmanager
def scores_in_one_matrix() -> Iterator[None]:
    """Sessions that are opened inside compute a whole matrix; whoever has set the switch keeps his choice."""
    _switch.set()
    try:
        yield
    finally:
        _switch.put_back()


def most_tokens(total: int, heads: int) -> int:
    """How many of ``total`` tokens may come at once, so that the scores of all heads stay within bounds.

    Args:
        total: tokens of each row, new ones included.
        heads: query heads of all rows that are read at once.
    """
    return max(_LEAST_TOKENS, _MOST_SCORE_BYTES // (4 * heads * max(1, total)))
