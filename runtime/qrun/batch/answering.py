"""Many lines, answered with one engine that is kept full."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from queue import SimpleQueue
from typing import Any

from qrun.answer import Answer, Piece
from qrun.batch.asking import Asking, Prepared
from qrun.batch.lines import Line, Record
from qrun.batch.ordering import ordered
from qrun.call import Call, EngineClosedError
from qrun.decoding.pieces import PIECE
from qrun.engine import Engine
from qrun.errors import QrunError
from qrun.model import Model

# Lines that are sorted together: enough for common beginnings to meet, little enough for a long file.
WINDOW = 1024
# Answers that an engine can take at once, whatever its rows are: how many answers a line may ask for must not
# depend on a measurement.
_CAPACITY = 256
# Prompts that wait in the engine beside those that are being answered, so that no row waits for a prompt.
_AHEAD = 8


def batch_engine(model: Model, rows: int, prefix_bytes: int, piece: int = PIECE) -> Engine:
    """An engine for one batch, which fills all rows before it decodes; close it.

    Args:
        model: nobody else may use its session meanwhile.
        rows: prompts that are answered at once; up to 128.
        prefix_bytes: of memory, for beginnings of prompts.
        piece: tokens of a prompt that are read at once, see ``beginnings``.

    Raises:
        QrunError: see ``Engine``.
    """
    model.even_steps = model.manifest.target == "onnxruntime"
    if not model.even_steps:  # a plan has one row, whose keys and values cannot be copied
        prefix_bytes = 0
    queue = _CAPACITY - rows
    return Engine(model, slots=rows, queue=queue, chunk=piece, prefix_bytes=prefix_bytes, prompts_first=True)


@dataclass(eq=False)
class _Work:
    """A line on its way through the engine."""

    prepared: Prepared
    calls: list[Call] = field(default_factory=list)
    left: int = 0
    tried: int = 0
    error: QrunError | None = None


class Answerer:
    """Answers lines in whatever order is fastest; each answer is what it would be alone.

    Args:
        asking: makes requests of lines; its engine answers them, and nobody else should ask it meanwhile.
        window: lines that are read ahead and sorted together.
    """

    def __init__(self, asking: Asking, *, window: int = WINDOW) -> None:
        self._asking, self._engine, self._window = asking, asking.engine, window

    def answer(self, lines: Iterable[Line]) -> Generator[Record, None, None]:
        """One record for each line, as they come. Close the iterator to cancel what is running.

        Lines are taken by another thread, a window ahead.

        Raises:
            QrunError: the engine has come to its end. What a line is refused for is a record.
        """
        events = SimpleQueue[tuple[_Work, int, Any]]()
        source = iter(lines)
        running: set[_Work] = set()
        ready = deque[_Work]()
        with ThreadPoolExecutor(1, thread_name_prefix="qrun-batch") as pool:
            coming = pool.submit(self._next_window, source)
            try:
                more = True
                while True:
                    if more and len(ready) < _AHEAD and (coming.done() or not (ready or running)):
                        records, found, more = coming.result()
                        if more:
                            coming = pool.submit(self._next_window, source)
                        ready.extend(found)
                        yield from records
                        continue
                    self._feed(ready, running, events)
                    if not running:
                        if not more:
                            return
                        continue
                    work, index, event = events.get()
                    record = self._take(work, index, event, running, ready)
                    if record is not None:
                        yield record
            finally:
                for work in running:
                    for call in work.calls:
                        self._engine.cancel(call)

    def _next_window(self, source: Iterator[Line]) -> tuple[list[Record], list[_Work], bool]:
        """Error records, work in its order, and whether there may be more lines."""
        lines = list(islice(source, self._window))
        found = [self._asking.prepare(line) for line in lines]
        more = len(lines) == self._window
        work = ordered(
            [_Work(each) for each in found if isinstance(each, Prepared)],
            lambda each: each.prepared.asked.prompts[0],
            lambda each: each.prepared.asked.params[0].max_tokens or 0,
            tail=0 if more else 2 * self._engine.slots,
        )
        return [each for each in found if isinstance(each, Record)], work, more

    def _feed(self, ready: deque[_Work], running: set[_Work], events: SimpleQueue[Any]) -> None:
        """Give the engine so much work that no row is idle."""
        most = min(self._engine.slots + _AHEAD, self._engine.capacity)
        while ready:
            count = len(ready[0].prepared.asked.prompts)
            alone = ready[0].tried or any(work.tried for work in running)
            if running and (alone or sum(work.left for work in running) + count > most):
                return
            work = ready.popleft()
            running.add(work)
            self._submit(work, events)

    def _submit(self, work: _Work, events: SimpleQueue[Any]) -> None:
        def listener(index: int) -> Callable[[Any], None]:
            return lambda event: events.put((work, index, event))

        asked = work.prepared.asked
        work.left = len(asked.prompts)
        for index, (ids, params, constraint) in enumerate(
            zip(asked.prompts, asked.params, asked.constraints)
        ):
            fresh = None if constraint is None else constraint.fresh()
            try:
                work.calls.append(
                    self._engine.submit(ids, params, listener(index), constraint=fresh, scoring=asked.scoring)
                )
            except EngineClosedError:
                raise
            except QrunError as error:
                events.put((work, index, error))

    def _take(
        self, work: _Work, index: int, event: Any, running: set[_Work], ready: deque[_Work]
    ) -> Record | None:
        """Something has happened to an answer; the record, if that was the last of its line."""
        if isinstance(event, QrunError):
            work.error = event
        else:
            work.prepared.reply.see(index, event)
            if isinstance(event, Piece):
                work.prepared.reply.collect(index, event)
        if not isinstance(event, QrunError | Answer):
            return None
        work.left -= 1
        if work.left:
            return None
        running.remove(work)
        if work.error is None:
            return self._asking.record(work.prepared)
        if not work.tried:
            # A failed step fails all rows, and most of them are not to blame: each is tried once more, alone.
            again = self._asking.prepare(work.prepared.line)
            if isinstance(again, Record):
                return again
            ready.append(_Work(again, tried=1))
            return None
        return self._asking.failed(work.prepared, work.error)
