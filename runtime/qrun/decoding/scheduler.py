"""Who advances in a step: every answer by one token, and prompts by one piece, or several short ones.

scheduler = Scheduler(Slots(session, rows=8))
scheduler.add(Sequence(prompt_ids, params, context_length))
while scheduler.busy:
    for sequence, event in scheduler.step():
        ...
"""

from __future__ import annotations

import logging
from collections import deque
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from qrun.backends.session import LogitsFor
from qrun.decoding.pieces import GRAIN, Pieces
from qrun.decoding.prefix_cache import PrefixCache
from qrun.decoding.sequence import Event, Failed, Finished, Sequence
from qrun.decoding.slots import Slots
from qrun.decoding.speculation import Speculation
from qrun.errors import QrunError

# Longer pieces are no faster, and the memory for activations grows with them.
PREFILL_CHUNK = 256
# The same where logits of all of them are wanted: 32 times Qwen's vocabulary in float32 are 19 MB.
SCORED_CHUNK = 32

Events = list[tuple[Sequence, Event]]
_log = logging.getLogger("qrun.engine")


class Scheduler:
    """Advances any number of sequences over the rows of ``slots``, in the order in which they were added.

    Sequences whose prompts are read decode in the first rows, without a gap; the one whose prompt is being
    read has the row after them; the others wait. Nobody else may feed these rows meanwhile.

    A sequence gets the tokens that it would get alone, whatever runs beside it and whatever ran before, where
    the graph's products give a row the same bits in any company (fp32, int8, int4 in blocks of up to 32).

    Args:
        slots: the rows; what they hold is reused where a prompt begins with it.
        chunk: tokens of a prompt that are read at once.
        grain: cuts between pieces are multiples of so many tokens, and only whole pieces are reused that were
            read as a prompt, see ``Pieces``. None reuses all that a prompt begins with, which suits a single
            conversation: its answers need not be read again, but their keys and values come from single steps
            and may differ in the last bits from those of a prompt. All pieces are even then: nobody waits.
        prefixes: where beginnings of prompts are kept when their rows are needed for others.
        speculation: tries several tokens of an answer in one step. With more rows than one a step's weights
            are shared already, and several tokens go through the graph for one row at a time: so they are
            tried there only where each of the answers gains by it, and no prompt waits to be read.
        prompts_first: fill all rows before anything is decoded. A step costs little more for many rows than
            for few, so a list of prompts is done sooner; an answer stands still while prompts are read.
    """

    def __init__(
        self,
        slots: Slots,
        *,
        chunk: int = PREFILL_CHUNK,
        grain: int | None = GRAIN,
        prefixes: PrefixCache | None = None,
        speculation: Speculation | None = None,
        prompts_first: bool = False,
    ) -> None:
        assert prefixes is None or prefixes.grain == grain, "blocks are kept in the size that is reused"
        self._slots = slots
        self._pieces = Pieces(chunk, even=True) if grain is None else Pieces(chunk, grain)
        self._scored = Pieces(min(SCORED_CHUNK, chunk), even=True)
        self._reuses_all = grain is None
        self._prefixes = prefixes
        self._speculation = speculation
        self._prompts_first = prompts_first
        self._waiting: deque[Sequence] = deque()
        self._reading: Sequence | None = None
        self._decoding: list[Sequence] = []

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._decoding or self._waiting or self._reading is not None)

    @property
    def cache_bytes(self) -> int:
        """Bytes that keys and values of all rows take now."""
        return self._slots.cache.nbytes

    @property
    def room(self) -> int:
        """How many more sequences can be added and get a row at once."""
        taken = len(self._decoding) + len(self._waiting) + (self._reading is not None)
        return max(0, len(self._slots) - taken)

    def add(self, sequence: Sequence) -> None:
        """Put a sequence in line; it may be cancelled at any time, by ``Sequence.cancel``."""
        self._waiting.append(sequence)

    def step(self) -> Events:
        """Decode a token of every answer, or several, then read one piece of a prompt, or several short ones.

        Returns:
            What has happened, in order. The last event of a sequence is ``Finished``, or ``Failed`` where it
            could not go on. A token is fed in the step after the one that has chosen it, so the last token of
            an answer is never fed.
        """
        events: Events = []
        self._drop_cancelled(events)
        if not (self._prompts_first and self._may_read):
            self._decode(events)
        self._read(events)
        if self._speculation is not None:
            for sequence, event in events:
                if isinstance(event, Finished):
                    self._speculation.ended(sequence)
        return events

    @property
    def _may_read(self) -> bool:
        """Whether a prompt is being read, or has a row to be read into."""
        return self._reading is not None or bool(self._waiting and len(self._decoding) < len(self._slots))

    def _decode(self, events: Events) -> None:
        if not self._decoding:
            return
        guesses = self._guess()
        if guesses is not None and (len(guesses) == 1 or any(guesses)):
            over = [row for row, each in enumerate(guesses) if not self._decode_apart(row, each, events)]
        else:
            over = self._decode_together(guesses is not None, events)
        for row in reversed(over):  # from the last one on, so that only rows that go on are moved
            self._retire(row)

    def _guess(self) -> list[list[int]] | None:
        """What to try after the last token of each answer; None where nothing is to be learnt of the step."""
        if self._speculation is None or not all(sequence.is_read for sequence in self._decoding):
            return None
        if len(self._decoding) == 1:
            return [self._speculation.guess(self._decoding[0])]
        if self._may_read:  # a prompt would wait for the steps of all rows
            return None
        return self._speculation.guess_apart(self._decoding)

    def _decode_together(self, learns: bool, events: Events) -> list[int]:
        """One step of all answers, over one token each; returns the rows whose answers are over."""
        started = perf_counter()
        try:
            logits = self._slots.step([sequence.next_id for sequence in self._decoding])
        except QrunError as error:  # all rows take part in one step, so its failure is that of all
            events += [(sequence, Failed(error)) for sequence in self._decoding]
            return list(range(len(self._decoding)))
        seconds = perf_counter() - started
        events += [(sequence, sequence.advance(1)) for sequence in self._decoding if not sequence.is_read]
        over = [
            row
            for row, sequence in enumerate(self._decoding)
            if not self._choose(sequence, logits[row], events)
        ]
        if learns and self._speculation is not None:
            self._speculation.learn_together(self._decoding, seconds)
        return over

    def _decode_apart(self, row: int, guesses: list[int], events: Events) -> bool:
        """One step of one answer, over its last token and what may follow it; whether the answer goes on."""
        assert self._speculation is not None
        sequence = self._decoding[row]
        fed = [sequence.token_ids[-1], *guesses]
        held, before, started = len(self._slots.token_ids[row]), sequence.accepted, perf_counter()
        try:
            alone = not guesses and len(self._decoding) == 1
            logits = self._slots.step(fed) if alone else self._slots.feed(row, fed, logits="all")
        except QrunError as error:
            events.append((sequence, Failed(error)))
            return False
        seconds = perf_counter() - started
        sequence.guessed += len(guesses)
        goes_on = self._choose(sequence, logits[0], events)
        for guess, following in zip(guesses, logits[1:]):
            if not goes_on or not _came_true(guess, sequence):
                break
            sequence.accepted += 1
            goes_on = self._choose(sequence, following, events)
        came_true = sequence.accepted - before
        self._speculation.learn(sequence, guesses, came_true, seconds)
        self._slots.trim(row, held + 1 + came_true)
        return goes_on

    def _read(self, events: Events) -> None:
        """Read one piece, or several short ones, so that short prompts do not wait for a step each."""
        spent = 0.0
        while self._reading is not None:
            sequence = self._reading
            piece = sequence.next_piece(self._scored if sequence.is_scored else self._pieces)
            work = self._pieces.work(sequence.read, len(piece))
            if spent and spent + work > 2:
                return
            spent += work
            self._read_piece(sequence, piece, events)
            self._admit(events)
        self._admit(events)

    def _read_piece(self, sequence: Sequence, piece: list[int], events: Events) -> None:
        row, scored = len(self._decoding), sequence.is_scored
        whole = sequence.read + len(piece) == len(sequence.prompt_ids)
        # A last token that would have a run of its own goes along with the next step of all answers.
        later = whole and not scored and self._slots.reads_last_apart(len(piece))
        wanted: LogitsFor = "all" if scored else "last" if whole and not later else "none"
        try:
            logits = self._slots.feed(row, piece[:-1] if later else piece, logits=wanted, whole=not whole)
        except QrunError as error:
            events.append((sequence, Failed(error)))
            self._reading = None
            return
        if scored:
            events.append((sequence, sequence.score(logits)))
            logits = logits[-1]
        events.append((sequence, sequence.advance(len(piece) - later)))
        if whole:
            self._reading = None
            if self._prefixes is not None:
                self._prefixes.keep(self._slots, row)
            if later or self._choose(sequence, logits, events):
                self._decoding.append(sequence)

    def _admit(self, events: Events) -> None:
        if self._reading is not None or not self._waiting or len(self._decoding) == len(self._slots):
            return
        sequence = self._waiting.popleft()
        event = self._begin(sequence)
        events.append((sequence, event))
        if not isinstance(event, Failed):
            self._reading = sequence

    def _begin(self, sequence: Sequence) -> Event:
        row = len(self._decoding)
        try:
            kept = self._keep(sequence, row)
            self._slots.prepare(row, len(sequence.prompt_ids), sequence.room)
        except QrunError as error:
            return Failed(error)
        return sequence.begin(kept)

    def _keep(self, sequence: Sequence, row: int) -> int:
        """Keep what a row has of a prompt already; returns how many tokens that are."""
        if sequence.is_scored:
            self._slots.trim(row, 0)
            return 0
        pieces = None if self._reuses_all else self._pieces
        kept = self._slots.keep(row, sequence.prompt_ids, pieces)
        if self._prefixes is not None and pieces is not None:
            kept = self._prefixes.restore(self._slots, row, sequence.prompt_ids, pieces)
        return kept

    def _choose(self, sequence: Sequence, logits: NDArray[np.float32], events: Events) -> bool:
        """Choose a sequence's next token; returns whether the sequence goes on."""
        try:
            found: list[Event] = sequence.choose(logits)
        except QrunError as error:
            found = [Failed(error)]
        except Exception as error:  # a fault of ours in one answer is none of the others'
            _log.exception("a token could not be chosen")
            found = [Failed(QrunError(f"the answer could not be completed: {type(error).__name__}: {error}"))]
        events += [(sequence, event) for event in found]
        return sequence.finish_reason is None and not isinstance(found[-1], Failed)

    def _drop_cancelled(self, events: Events) -> None:
        for row in reversed(range(len(self._decoding))):
            if self._decoding[row].cancelled:
                events.append((self._decoding[row], self._decoding[row].finish("cancelled")))
                self._retire(row)
        if self._reading is not None and self._reading.cancelled:
            events.append((self._reading, self._reading.finish("cancelled")))
            self._reading = None
        for sequence in [each for each in self._waiting if each.cancelled]:
            self._waiting.remove(sequence)
            events.append((sequence, sequence.finish("cancelled")))

    def _retire(self, row: int) -> None:
        """Free a row, and move the last decoding row, and then the one that reads, so that no gap is left."""
        last = len(self._decoding) - 1
        if row != last:
            self._slots.move(last, row)
            self._decoding[row] = self._decoding[last]
        self._decoding.pop()
        if self._reading is not None:
            self._slots.move(last + 1, last)


def _came_true(guess: int, sequence: Sequence) -> bool:
    """Whether a sequence has chosen by itself what was guessed, so that the logits behind it are its own."""
    return sequence.token_ids[-1] == guess
