"""How ONNX Runtime's attention reads a prompt on the CPU, and how many tokens it may be given at once.

``GroupQueryAttention`` has two ways (since 1.28): a whole matrix of scores, or tiles of it ("flash
attention", its default for several tokens). Up to some thousand tokens the matrix takes half to four
fifths of the time (256 tokens of a 0.5B model's layer: 1.4 ms instead of 2.8, after 1,792 others 9.2 instead
of 11.8; after 8,000 both take the same). Its memory grows with the context, so that after many tokens fewer
are read at once. The package sets the switch between the two, ``ORT_GQA_DISABLE_FLASH_ATTENTION``, unless the
user has set it.

That kernel computes each query head by itself. Graphs of qconvert can also multiply all query heads of a
key/value head at once, where one token is added (``BY_GROUPS``, docs/model-folder.md): behind
8,000 tokens that takes half the time, behind 500 as long as the kernel.
"""

from __future__ import annotations

_MOST_SCORE_BYTES = 128 << 20
_LEAST_TOKENS = 64  # matrix products of fewer are slow

# The input that asks for attention by groups; graphs without it have one way only.
BY_GROUPS = "attend_by_groups"
_LEAST_BY_GROUPS = 512
# It multiplies the cache to its end, filled or not.
_MOST_PLACES_A_TOKEN = 1.25


def most_tokens(total: int, heads: int) -> int:
    """How many of ``total`` tokens may come at once, so that the scores of all heads stay within bounds.

    Args:
        total: tokens of each row, new ones included.
        heads: query heads of all rows that are read at once.
    """
    return max(_LEAST_TOKENS, _MOST_SCORE_BYTES // (4 * heads * max(1, total)))


def pays_by_groups(tokens: int, places: int) -> bool:
    """Whether a step of one token is faster by groups.

    Args:
        tokens: of the row, the new one included.
        places: that the cache has for it.
    """
    return tokens >= _LEAST_BY_GROUPS and places <= _MOST_PLACES_A_TOKEN * tokens
