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

# Read by ONNX Runtime while it makes a session's kernels.
_SWITCH = "ORT_GQA_DISABLE_FLASH_ATTENTION"
_MOST_SCORE_BYTES = 64 << 20
_LEAST_TOKENS = 64  # matrix products of fewer are slow


@contextmanager
def scores_in_one_matrix() -> Iterator[None]:
    """Sessions that are opened inside compute a whole matrix; whoever has set the switch keeps his choice."""
    if _SWITCH in os.environ:
        yield
        return
    os.environ[_SWITCH] = "1"
    try:
        yield
    finally:
        os.environ.pop(_SWITCH, None)


def most_tokens(total: int, heads: int) -> int:
    """How many of ``total`` tokens may come at once, so that the scores of all heads stay within bounds."""
    return max(_LEAST_TOKENS, _MOST_SCORE_BYTES // (4 * heads * max(1, total)))
