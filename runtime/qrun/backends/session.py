"""The one interface behind which every backend runs a model.

    session = open_session("./model-folder")
    cache = session.new_cache()
    logits = session.forward(token_ids, cache)     # token_ids int64 [batch, new]; float32 [batch, 1, vocab]

``forward`` appends to the cache at each row's own length: the position of a token is the number of
tokens that were in its row before it.
"""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from qrun.backends.kvcache import KVCache
from qrun.folder.manifest import Manifest

LogitsFor = Literal["last", "all", "none"]


class Session(Protocol):
    """A model that is ready to run.

    Attributes:
        manifest: what the model is.
        device: where it really runs, for people: "CPU, 2 threads".
    """

    manifest: Manifest
    device: str

    def new_cache(self, batch: int = 1, *, in_place: bool = True) -> KVCache:
        """An empty KV cache for this session.

        Args:
            batch: number of sequences.
            in_place: past and present share one buffer (fast). False gives the form in which every
                step returns longer tensors, as other programs run the same graph.
        """
        ...

    def reads_last_apart(self, new: int) -> bool:
        """Whether ``forward`` runs the last one of ``new`` tokens of one row by itself, for its logits.

        It may then as well be fed in a step of several rows, after the others, which costs less.
        """
        ...

    def forward(
        self, token_ids: NDArray[np.int64], cache: KVCache, logits: LogitsFor = "last"
    ) -> NDArray[np.float32]:
        """Run new tokens through the decoder and append their keys and values to the cache.

        Args:
            token_ids: int64 ``[batch, new]``.
            cache: from this session's ``new_cache``, or some rows of one; grown as needed and advanced by
                ``new``. Where this raises, it holds what it held before.
            logits: for which of the new positions to compute logits.

        Returns:
            float32 ``[batch, positions, vocab]`` with 1, new or 0 positions. For "last" it is the
            buffer of these rows, valid until one of them is fed again; feeding other rows or
            caches does not change it. Copy it to keep it longer.

        Raises:
            QrunError: a token id outside the vocabulary, or more tokens than the context holds.
        """
        ...
