"""The ways in which a prompt can go through a session, told as data, and the reader that takes them.

Every path is one that ``qrun`` or another program takes: the prompt at once, in chunks, token by
token, with a cache that is written in place or one that grows, cut back and continued.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from qrun.backends.session import LogitsFor, Session

if TYPE_CHECKING:
    import torch

Logits = Iterator[NDArray[np.float32]]

# Uneven on purpose: a chunk of one token in the middle takes the path of decoding, and none of the
# later boundaries falls on a multiple of a kernel's tile.
CHUNKS = (64, 1, 30, 97)
STEPS = 64
# Steps of paths that have one row of logits a step: more than ENOUGH_FOR_SHARES, so all limits are judged.
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
class Part:
    """A prompt's next tokens, and how they are fed.

    Attributes:
        logits: of every position, of the last position of every piece, of the part's last position alone,
            or none.
        pieces: how many tokens are fed at once, in turn and over again; none given is all of the part.
        left: tokens that are left for the parts after it; one token is read in any case.
        at_most_half: no more than half of the prompt is left.
        detour: tokens that do not belong here, fed after the part and cut off again.
    """

    logits: Literal["all", "each piece", "end", "none"]
    pieces: tuple[int, ...] = ()
    left: int = 0
    at_most_half: bool = False
    detour: int = 0

    def stop(self, count: int) -> int:
        """The position after the part, in a prompt of so many tokens."""
        left = min(self.left, count // 2) if self.at_most_half else self.left
        return max(1, count - left)

    def cut(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Begin and end of each piece between two positions."""
        sizes = cycle(self.pieces or (stop - start,))
        while start < stop:
            end = min(start + next(sizes), stop)
            yield start, end
            start = end

    def wanted(self, *, last_piece: bool) -> LogitsFor:
        """What a session is asked for."""
        if self.logits == "end":
            return "last" if last_piece else "none"
        return "last" if self.logits == "each piece" else self.logits


@dataclass(frozen=True)
class PromptPath:
    """A way through the session.

    Attributes:
        name: for reports.
        parts: from the first token to the last.
        in_place: the kind of KV cache.
    """

    name: str
    parts: tuple[Part, ...]
    in_place: bool = True

    def feed(self, session: Session, token_ids: Sequence[int]) -> Logits:
        """Logits ``[rows, vocab]`` in the order of positions, valid until the next ones are asked for."""
        cache, start = session.new_cache(in_place=self.in_place), 0
        for part in self.parts:
            stop = part.stop(len(token_ids))
            for begin, end in part.cut(start, stop):
                wanted = part.wanted(last_piece=end == stop)
                logits = session.forward(_tokens(token_ids[begin:end]), cache, wanted)
                if wanted != "none":
                    yield logits[0]
            if part.detour:
                room = min(part.detour, len(token_ids) - stop)  # the context may end with the prompt
                session.forward(_tokens(token_ids[:room]), cache, "none")
                cache.trim(stop)
            start = stop

    def first(self, count: int) -> int:
        """The position of the first row of logits, for a prompt of so many tokens."""
        start = 0
        for part in self.parts:
            stop = part.stop(count)
            for begin, end in part.cut(start, stop):
                wanted = part.wanted(last_piece=end == stop)
                if wanted != "none":
                    return begin if wanted == "all" else end - 1
            start = stop
        raise AssertionError(f"{self.name}: a path has logits")


def _tokens(token_ids: Sequence[int]) -> NDArray[np.int64]:
    return np.asarray(token_ids, dtype=np.int64)[None]


_GROWING = ", growing cache"


def _growing(path: PromptPath) -> PromptPath:
    return replace(path, name=path.name + _GROWING, in_place=False)


_ALL = Part("all")
_ONE_BY_ONE = Part("each piece", pieces=(1,))
_KEPT = Part("none", left=CONTINUED, detour=TRIMMED)
_PROMPT = Part("none", pieces=(PROMPT_PIECE,), left=PROMPT_CONTINUED, at_most_half=True)

WHOLE = PromptPath("whole", (_ALL,))
WHOLE_GROWING = _growing(WHOLE)
LAST = PromptPath("last position only", (Part("end"),))
CHUNKED = PromptPath("in chunks", (Part("all", pieces=CHUNKS),))
CHUNKED_GROWING = _growing(CHUNKED)
STEPPED = PromptPath("token by token", (Part("end", left=STEPS), _ONE_BY_ONE))
STEPPED_GROWING = _growing(STEPPED)
TRIMMED_BACK = PromptPath("cut back and continued", (_KEPT, _ALL))
TRIMMED_BACK_GROWING = _growing(TRIMMED_BACK)
PROMPTED = PromptPath("prompt by its own graph", (_PROMPT, _ALL))
FILLED = PromptPath("to the last slot", (Part("end", pieces=(FILLING,), left=STEPS), _ONE_BY_ONE))
CHUNKED_STEPPED = PromptPath(
    "in chunks, then token by token",
    (Part("end", pieces=CHUNKS, left=MANY_STEPS, at_most_half=True), _ONE_BY_ONE),
)
TRIMMED_BACK_STEPPED = PromptPath("cut back, then token by token", (_KEPT, _ONE_BY_ONE))
_ONE_POSITION = {WHOLE.name: LAST, CHUNKED.name: CHUNKED_STEPPED, TRIMMED_BACK.name: TRIMMED_BACK_STEPPED}


def prompt_length(count: int) -> int:
    """Tokens that a second graph for prompts reads on the way ``PROMPTED``, and another continues."""
    return _PROMPT.stop(count)


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
        self._source = path.feed(session, token_ids)
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
