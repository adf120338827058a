"""How long the pieces are in which a batch reads its prompts.

Long pieces are read faster. But only whole pieces are found again by prompts that begin alike, so a list
whose prompts share a long beginning, such as an instruction with examples, is done sooner in short ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import islice, pairwise

from qrun.batch.lines import Line
from qrun.batch.opening import Maker
from qrun.batch.requests import BatchLines
from qrun.batch.sources import Row
from qrun.decoding.pieces import PIECE, Pieces
from qrun.folder.manifest import Manifest

# Prompts of up to twice as many tokens are read in one piece.
LONG = 512
# A token of a short piece takes about so many times as long (0.5B in int8, 2 threads: 1.1 and 0.7 ms).
_SHORT_COSTS = 1.5
_LOOKED_AT = 512
_CHARACTERS_PER_TOKEN = 4


def piece_tokens(rows: Iterable[Row], maker: Maker, manifest: Manifest) -> int:
    """Tokens of a piece, for the ``chunk`` of an engine.

    It follows from the first rows of the input alone, not from what is answered already: a job that goes on
    after a kill, and every worker of a cluster, read a prompt in the same pieces.

    Args:
        rows: of the input, from its beginning.
        maker: makes requests of them; a copy is used of one that remembers what it has seen.
        manifest: of the model. Where one graph with a cache of 8 bits does all, attention takes so much time
            in long pieces that a prompt of 512 tokens is read at 550 tokens a second instead of 890 (0.5B).
            A plan was built for pieces of a certain length.
    """
    slow = manifest.kv.dtype == "int8" and manifest.prefill is None
    if slow or manifest.target != "onnxruntime":
        return PIECE
    fresh = BatchLines() if isinstance(maker, BatchLines) else maker
    texts = sorted(_text(line) for line in fresh.lines(islice(rows, _LOOKED_AT)))
    return min((LONG, PIECE), key=lambda length: _work(texts, length))


def _text(line: Line) -> str:
    """What a prompt consists of, in its order; of token ids their numbers, which are about as long."""
    body = line.body
    asked = [body.get(name) for name in ("tools", "system", "instructions", "messages", "prompt", "input")]
    return json.dumps([each for each in asked if each is not None], ensure_ascii=False)


def _work(texts: Sequence[str], length: int) -> float:
    """What reading them takes, beginning with those before them in their order found again."""
    cost = 1.0 if length == LONG else _SHORT_COSTS
    pieces = Pieces(length)
    total = 0.0
    for before, text in pairwise(["", *texts]):
        tokens = len(text) // _CHARACTERS_PER_TOKEN + 1
        alike = _alike(before, text) // _CHARACTERS_PER_TOKEN
        total += cost * (tokens - pieces.whole(min(alike, tokens - 1), tokens))
    return total


def _alike(one: str, other: str) -> int:
    """Characters with which both begin."""
    return next((n for n, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
