"""Second moments of the inputs of a product, over all tokens of a text.

Products are in the type of the inputs. In bfloat16 each piece's sum is rounded once to 8 bits, an error of
one part in 500 of each entry that has no direction; what the choice of the text does to it is far more.
Pieces are added in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor

import torch

# Rows of the result that one thread computes at a time: this share of them, and no fewer than this many.
_CUTS, _FEWEST_ROWS = 16, 64


def squares(inputs: Sequence[torch.Tensor], workers: Executor) -> torch.Tensor:
    """Mean of x x^T, float32 ``[K, K]``; below the diagonal there is only what came along with it.

    Args:
        inputs: x of some tokens each, ``[tokens, K]``.
        workers: threads that share the work; how many there are changes no bit.
    """
    columns = inputs[0].shape[1]
    total = torch.zeros(columns, columns)
    _add(total, inputs, inputs, workers, upper=True)
    return total.div_(sum(map(len, inputs)))


def crossed(left: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], workers: Executor) -> torch.Tensor:
    """Mean of y x^T, float32 ``[M, K]``, for y of the same tokens ``[tokens, M]``."""
    total = torch.zeros(left[0].shape[1], inputs[0].shape[1])
    _add(total, left, inputs, workers, upper=False)
    return total.div_(sum(map(len, inputs)))


def _add(
    total: torch.Tensor,
    left: Sequence[torch.Tensor],
    right: Sequence[torch.Tensor],
    workers: Executor,
    *,
    upper: bool,
) -> None:
    step = max(_FEWEST_ROWS, -(-len(total) // _CUTS))

    def rows(start: int) -> None:
        first = start if upper else 0
        part = total[start : start + step, first:]
        for ours, theirs in zip(left, right, strict=True):
            transposed, other = ours[:, start : start + step].t(), theirs[:, first:]
            if other.dtype == torch.float32:
                part.addmm_(transposed, other)
            else:
                part += transposed @ other

    for _ in workers.map(rows, range(0, len(total), step)):
        pass  # map is lazy: this waits, and raises a thread's error
