"""Token ids, checked before they go into any graph: an index out of range reads somebody else's memory."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qrun.errors import QrunError


def check_token_ids(token_ids: NDArray[np.int64], vocab_size: int) -> None:
    """Refuse what the embedding has no row for.

    Raises:
        QrunError: no token ids at all, or one outside the vocabulary.
    """
    hint = "encode the text with the tokenizer of the same model folder"
    if token_ids.size == 0:
        raise QrunError("no token ids were given", hint=hint)
    for token_id in (int(token_ids.min()), int(token_ids.max())):
        if not 0 <= token_id < vocab_size:
            raise QrunError(f"token id {token_id} is outside the vocabulary of {vocab_size:,}", hint=hint)
