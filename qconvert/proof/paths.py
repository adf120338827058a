"""The ways in which a prompt can go through a session, each a generator of logits in the order of positions.

Every path is one that ``qrun`` or another program takes: the prompt at once, in chunks, token by
token, with a cache that is written in place or one that grows, cut back and continued.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qrun.backends.session import Session

if TYPE_CHECKING:
    import torch

Logits = Iterator[NDArray[np.float32]]

# Uneven on purpose: a chunk of one token in the middle takes the path of decoding, and none of the
# later boundaries falls on a multiple of a kernel's tile.
CHUNKS = (64, 1, 30, 97)
STEPS = 64
# Steps for paths with one row of logits per step; more than ENOUGH_FOR_SHARES, so that every limit is judged.
MANY_STEPS = 128
# Tokens that are fed, cut off again and replaced.
TRIMMED = 8
CONTINUED = 24
# A prompt's pieces, and what follows it: enough positions for every measure to be judged.
PROMPT_PIECE = 192
PROMPT_CONTINUED = 128
# Tokens fed at once while a whole cache is filled: attention's scores take pieces x cache x heads.
FILLING = 256


@dataclass(frozen=True)
class PromptPath:
    """A way through the session.

    Attributes:
        name: for reports.
        in_place: the kind of KV cache.
        feed: yields logits ``[rows, vocab]``, valid until the next one is asked for.
        first: position of the first row, for a prompt of so many tokens.
    """

    name: str
    in_place: bool
    feed: Callable[[Session, Sequence[int], bool], Logits]
    first: Callable[[int], int]


def _tokens(token_ids: Sequence[int]) -> NDArray[np.int64]:
    return np.asarray(token_ids, dtype=np.int64)[None]


def _whole(session: Session, token_ids: Sequence[int], in_place: bool) -> Logits:
    yield session.forward(_tokens(token_ids), session.new_cache(in_place=in_place), "all")[0]


def _last(session: Session, token_ids: Sequence[int], in_place: bool) -> Logits:
    yield session.forward(_tokens(token_ids), session.new_cache(in_place=in_place), "last")[0]


def _chunks(session: Session, token_ids: Sequence[int], in_place: bool) -> Logits:
    cache, sizes, start = session.new_cache(in_place=in_place), cycle(CHUNKS), 0
    while start < len(token_ids):
        stop = start + next(sizes)
        yield session.forward(_tokens(token_ids[start:stop]), cache, "all")[0]
        start = stop


def _steps(session: Session, token_ids: Sequence[int], in_place: bool) -> Logits:
    cache, prefilled = session.new_cache(in_place=in_place), _prefilled(len(token_ids))
    yield session.forward(_tokens(token_ids[:prefilled]), cache, "last")[0]
    for token in token_ids[prefilled:]:
        yield session.forward(_tokens([token]), cache, "last")[0]


def _prefilled(count: int) -> int:
    return max(1, count - STEPS)


def _trimmed(session: Session, token_ids: Sequence[int], in_place: bool) -> Logits:
    cache, kept = session.new_cache(in_place=in_place), _kept(len(token_ids))
    session.forward(_tokens(token_ids[:kept]), cache, "none")
    wrong = token_ids[: min(TRIMMED, len(token_ids) - kept)]  # that do not belong here, within the context
    session.forward(_tokens(wrong), cache, "none")
    cache.trim(kept)
    yield session.forward(_tokens(token_ids[kept:]), cache, "all")[0]


def _filled(session: Session, token_ids: Sequence[int], in_place: bool) -> Logits:
    cache, prefilled = session.new_cache(in_place=in_place), _prefilled(len(token_ids))
    for start in range(0, prefilled, FILLING):
        piece = token_ids[start : min(start + FILLING, prefilled)]
        logits = session.forward(_tokens(piece), cache, "last")
    yield logits[0]
    for token in token_ids[prefilled:]:
        yield session.forward(_tokens([token]), cache, "last")[0]


def _prompted(session: Session, token_ids: Sequence[int], in_place: bool) -> Logits:
    cache, prompt = session.new_cache(in_place=in_place), prompt_length(len(token_ids))
    for start in range(0, prompt, PROMPT_PIECE):
        piece = token_ids[start : min(start + PROMPT_PIECE, prompt)]
        session.forward(_tokens(piece), cache, "none")
    yield session.forward(_tokens(token_ids[prompt:]), cache, "all")[0]


def prompt_length(count: int) -> int:
    """Tokens that a second graph for prompts reads on the way ``PROMPTED``, and another continues."""
    return count - min(PROMPT_CONTINUED, count // 2)


def _kept(count: int) -> int:
    return max(1, count - CONTINUED)


def _chunked_stepped(session: Session, token_ids: Sequence[int], in_place: bool) -> Logits:
    cache, prefilled = session.new_cache(in_place=in_place), _chunked(len(token_ids))
    sizes, start = cycle(CHUNKS), 0
    while start < prefilled:
        piece = token_ids[start : min(start + next(sizes), prefilled)]
        logits = session.forward(_tokens(piece), cache, "last")
        start += len(piece)
    yield logits[0]
    for token in token_ids[prefilled:]:
        yield session.forward(_tokens([token]), cache, "last")[0]


def _chunked(count: int) -> int:
    return max(1, count - min(MANY_STEPS, count // 2))


def _trimmed_stepped(session: Session, token_ids: Sequence[int], in_place: bool) -> Logits:
    cache, kept = session.new_cache(in_place=in_place), _kept(len(token_ids))
    session.forward(_tokens(token_ids[:kept]), cache, "none")
    session.forward(_tokens(token_ids[: min(TRIMMED, len(token_ids) - kept)]), cache, "none")
    cache.trim(kept)
    for token in token_ids[kept:]:
        yield session.forward(_tokens([token]), cache, "last")[0]


WHOLE = PromptPath("whole", True, _whole, lambda count: 0)
WHOLE_GROWING = PromptPath("whole, growing cache", False, _whole, lambda count: 0)
LAST = PromptPath("last position only", True, _last, lambda count: count - 1)
CHUNKED = PromptPath("in chunks", True, _chunks, lambda count: 0)
CHUNKED_GROWING = PromptPath("in chunks, growing cache", False, _chunks, lambda count: 0)
STEPPED = PromptPath("token by token", True, _steps, lambda count: _prefilled(count) - 1)
STEPPED_GROWING = PromptPath(
    "token by token, growing cache", False, _steps, lambda count: _prefilled(count) - 1
)
TRIMMED_BACK = PromptPath("cut back and continued", True, _trimmed, _kept)
TRIMMED_BACK_GROWING = PromptPath("cut back and continued, growing cache", False, _trimmed, _kept)


PROMPTED = PromptPath("prompt by its own graph", True, _prompted, prompt_length)
FILLED = PromptPath("to the last slot", True, _filled, lambda count: _prefilled(count) - 1)
CHUNKED_STEPPED = PromptPath(
    "in chunks, then token by token", True, _chunked_stepped, lambda count: _chunked(count) - 1
)
TRIMMED_BACK_STEPPED = PromptPath("cut back, then token by token", True, _trimmed_stepped, _kept)
_GROWING = ", growing cache"
_ONE_POSITION = {WHOLE.name: LAST, CHUNKED.name: CHUNKED_STEPPED, TRIMMED_BACK.name: TRIMMED_BACK_STEPPED}


def with_static_cache(path: PromptPath) -> PromptPath:
    """The same way with the only kind of cache that a graph of fixed length has."""
    return replace(path, name=path.name.removesuffix(_GROWING), in_place=True)


def with_one_position(path: PromptPath) -> PromptPath:
    """The same way through a plan: one kind of cache, and logits of the last position alone.

    A plan computes logits for one position of a piece; more of them would cost a pass each.
    """
    static = with_static_cache(path)
    return _ONE_POSITION.get(static.name, static)


class PathReader:
    """Reads one path's logits by position, so that several paths can be compared side by side.

    Only what a path has just returned is held: one chunk, or the whole prompt where it goes whole.
    """

    def __init__(self, path: PromptPath, session: Session, token_ids: Sequence[int]) -> None:
        self.path = path
        self._source = path.feed(session, token_ids, path.in_place)
        self._rows: NDArray[np.float32] | None = None
        self._position = path.first(len(token_ids))

    def take(self, start: int, stop: int) -> tuple[int, torch.Tensor] | None:
        """Positions ``start`` to ``stop``: the first one that the path has, and a copy ``[rows, vocab]``.

        None if the path begins later. To be called with consecutive ranges.
        """
        import torch

        first, parts = max(start, self._position), []
        while self._position < stop:
            if self._rows is None or not len(self._rows):
                self._rows = next(self._source)
            part = self._rows[: stop - self._position]
            self._rows = self._rows[len(part) :]
            self._position += len(part)
            parts.append(torch.from_numpy(part.copy()))  # a session may return its own buffer again
        return (first, torch.cat(parts)) if parts else None
