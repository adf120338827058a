"""Many answers at once: one thread steps the model, any number of callers follow their answers.

engine = qrun.Engine(qrun.open("./Qwen2.5-1.5B-Instruct-onnx-int8"), slots=4)
async def ask(question):
    async for event in engine.chat([{"role": "user", "content": question}], max_tokens=200):
        if isinstance(event, qrun.Piece):
            print(event.text, end="", flush=True)
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Condition, Thread
from time import monotonic
from typing import Any

from qrun.answer import Answer, Event
from qrun.call import Call, EngineBusyError, EngineClosedError, Listener, check_stop
from qrun.decoding.fair_queue import FairQueue
from qrun.decoding.pieces import GRAIN, PIECE
from qrun.decoding.prefix_cache import PrefixCache
from qrun.decoding.prefix_files import empty_states, load_prefixes, prefix_file, save_prefixes
from qrun.decoding.scheduler import Scheduler
from qrun.decoding.sequence import Failed, Finished, Scored, Scoring
from qrun.decoding.slots import Slots
from qrun.decoding.speculation import SUFFIX_TOKENS, new_speculation
from qrun.errors import QrunError
from qrun.model import Model
from qrun.sampling.constraint import Constraint, Schema
from qrun.sampling.params import SamplingParams

_log = logging.getLogger("qrun.engine")


class Engine(AbstractContextManager["Engine"]):
    """A model that answers several prompts at once, each as if it were alone.

    Attributes:
        model: what it answers with.
        slots: how many answers advance together at most.
        prefixes: the kept beginnings of prompts; None where none are kept.
        speculation: what was learnt of guesses (``Model.speculate``); None where none are tried.

    Args:
        model: an opened model folder. Nobody else may use its session meanwhile.
        slots: rows of the KV cache; 1 for a plan.
        queue: prompts that may wait for a slot.
        chunk: tokens of a prompt that are read between two tokens of the other answers; a multiple of 64.
        prefix_bytes: memory for beginnings of prompts, which are then not read again; 0 keeps none.
        prefix_folder: where these are kept when the engine is closed, and taken from at the start.
        suffix_tokens: of ended prompts and answers, kept to guess from them with ``model.speculate``.
        max_tokens: of an answer; ``resolve`` refuses more, and an answer for which none are asked ends there.
        max_seconds: for a prompt, from ``submit`` on; see ``Call``.
        prompts_first: for lists of prompts, see ``Scheduler``.

    Raises:
        QrunError: slots or queue out of range, or a model that answers one sequence at a time.
    """

    def __init__(
        self,
        model: Model,
        *,
        slots: int = 4,
        queue: int = 64,
        chunk: int = PIECE,
        prefix_bytes: int = 0,
        prefix_folder: Path | None = None,
        suffix_tokens: int = SUFFIX_TOKENS,
        max_tokens: int | None = None,
        max_seconds: float | None = None,
        prompts_first: bool = False,
    ) -> None:
        if chunk % GRAIN or chunk < GRAIN:
            raise QrunError(f"pieces of {chunk} tokens", hint=f"give a multiple of {GRAIN}")
        if slots < 1 or queue < 0:
            raise QrunError(f"{slots} slots and a queue of {queue}", hint="give 1 slot and 0 places, or more")
        self.model, self.slots = model, slots
        self.max_tokens, self.max_seconds = max_tokens, max_seconds
        self._queue, self._schedule = queue, partial(Scheduler, chunk=chunk, prompts_first=prompts_first)
        self._changed, self._closing = Condition(), False
        self._waiting: FairQueue[Call] = FairQueue()
        self._running: dict[int, Call] = {}
        self.prefixes = PrefixCache(prefix_bytes, GRAIN) if prefix_bytes else None
        guessing = model.draft, suffix_tokens
        self.speculation = new_speculation(model.session, *guessing, speculate=model.speculate)
        self._scheduler = self._new_scheduler()
        self._prefix_file: Path | None = None
        if self.prefixes is not None and prefix_folder is not None:
            self._prefix_file = prefix_file(prefix_folder, model.session, GRAIN, chunk)
            load_prefixes(self.prefixes, self._prefix_file, empty_states(model.session))
        self._thread = Thread(target=self._work, name="qrun-engine", daemon=True)
        self._thread.start()

    def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        listener: Listener,
        *,
        client: str = "",
        constraint: Constraint | None = None,
        scoring: Scoring | None = None,
    ) -> Call:
        """Queue a prompt; the engine's thread calls ``listener`` with each event of its answer.

        Args:
            prompt_ids: the whole prompt.
            params: how to sample and when to stop.
            listener: called for each event, in order; it must not block.
            client: who asks.
            constraint: what the answer must fit: ``Model.constraint`` makes one for each answer.
            scoring: what is wanted of the prompt itself; its log-probabilities come as ``Scored`` events.

        Raises:
            EngineBusyError: too many wait already.
            EngineClosedError: after ``close``.
            QrunError: an empty prompt, or one longer than the context.
        """
        asked = self.model, prompt_ids, params, listener, client
        call = Call(*asked, constraint=constraint, scoring=scoring, seconds=self.max_seconds)
        with self._changed:
            if self._closing:
                raise EngineClosedError("the engine is closing: it takes no more prompts")
            if len(self._waiting) >= self._queue + max(0, self.slots - len(self._running)):
                raise EngineBusyError(
                    f"{len(self._running)} prompts are being answered and {len(self._waiting)} wait",
                    hint="try again in a moment",
                )
            self._waiting.put(client, call)
            self._changed.notify()
        return call

    async def answer(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        client: str = "",
        constraint: Constraint | None = None,
    ) -> AsyncIterator[Event]:
        """The events of one answer, for ``async for``. Leave the loop and close it to cancel the answer.

        Raises:
            QrunError: see ``submit``; or the answer could not be completed.
        """
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event | QrunError]()

        def listener(event: Event | Scored | QrunError) -> None:
            assert not isinstance(event, Scored), "nothing was to be scored"
            loop.call_soon_threadsafe(events.put_nowait, event)

        call = self.submit(prompt_ids, params, listener, client=client, constraint=constraint)
        try:
            while True:
                event = await events.get()
                if isinstance(event, QrunError):
                    raise event
                yield event
                if isinstance(event, Answer):
                    return
        finally:
            self.cancel(call)

    async def generate(
        self,
        prompt: str | Sequence[int],
        *,
        client: str = "",
        schema: Schema | None = None,
        regex: str | None = None,
        grammar: str | None = None,
        **sampling: Any,
    ) -> AsyncIterator[Event]:
        """Continue a prompt as it is; see ``Model.generate`` for all arguments and the events."""
        params = self.resolve(sampling)
        if isinstance(prompt, str):
            prompt = await asyncio.to_thread(self.model.tokenizer.encode, prompt, add_special_tokens=True)
        # In a thread, since compiling a form would hold up everyone on the event loop.
        constraint = await asyncio.to_thread(
            self.model.constraint, schema=schema, regex=regex, grammar=grammar
        )
        async for event in self.answer(prompt, params, client=client, constraint=constraint):
            yield event

    async def chat(self, messages: Sequence[Mapping[str, Any]], **asked: Any) -> AsyncIterator[Event]:
        """Answer a conversation, as messages with "role" and "content"; ``asked`` as for ``generate``."""
        ids = await asyncio.to_thread(self.model.chat_prompt, messages)
        async for event in self.generate(ids, **asked):
            yield event

    def resolve(self, sampling: Mapping[str, Any]) -> SamplingParams:
        """Every sampling parameter of a request, see ``Model.resolve``; within ``max_tokens``.

        Raises:
            QrunError: an unknown parameter or a bad value, by name; more tokens or stops than allowed.
        """
        params, _ = self.model.resolve(sampling)
        check_stop(params.stop)
        if (most := self.max_tokens) is None:
            return params
        if sampling.get("max_tokens") is not None and (params.max_tokens or 0) > most:
            raise QrunError(f"max_tokens must be at most {most} here, not {params.max_tokens}")
        return replace(params, max_tokens=min(params.max_tokens or most, most))

    def cancel(self, call: Call) -> None:
        """Cancel a call that waits or is being answered; one that has ended is left as it is."""
        call.cancel()
        with self._changed:
            self._changed.notify()

    @property
    def capacity(self) -> int:
        """Prompts that can be answered or wait at the same time."""
        return self.slots + self._queue

    @property
    def active(self) -> int:
        """Prompts that are being answered."""
        return len(self._running)

    @property
    def queued(self) -> int:
        """Prompts that wait."""
        return len(self._waiting)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the slots' keys and values."""
        return self._scheduler.cache_bytes

    @property
    def prefix_bytes(self) -> int:
        """Bytes of the beginnings of prompts that are kept."""
        return 0 if self.prefixes is None else self.prefixes.nbytes

    @property
    def alive(self) -> bool:
        """Whether the thread that steps the model runs: without it no prompt is ever answered."""
        return self._thread.is_alive()

    @property
    def prefix_hits(self) -> int:
        """Tokens of prompts that were found among the kept beginnings, and not read again."""
        return 0 if self.prefixes is None else self.prefixes.hits

    def close(self, *, drain_seconds: float = 0.0) -> None:
        """Take no more prompts and end; answers that run longer than ``drain_seconds`` are cancelled."""
        until = monotonic() + drain_seconds
        with self._changed:
            self._closing = True
            self._changed.notify()
            while (self._running or len(self._waiting)) and (left := until - monotonic()) > 0:
                self._changed.wait(min(left, 0.05))
            for call in (*self._running.values(), *self._waiting):
                call.cancel()
            self._changed.notify()
        self._thread.join()
        if self.prefixes is not None and self._prefix_file is not None:
            save_prefixes(self.prefixes, self._prefix_file)
            self._prefix_file = None  # closed twice, it is written once

    def __exit__(self, *_: object) -> None:
        self.close()

    def _new_scheduler(self) -> Scheduler:
        slots = Slots(self.model.session, self.slots, even_steps=self.model.even_steps)
        return self._schedule(slots, prefixes=self.prefixes, speculation=self.speculation)

    def _work(self) -> None:
        while self._admit():
            try:
                events = self._scheduler.step()
            except Exception as error:
                _log.exception("a step has failed")
                if not self._begin_anew(error):
                    return
                continue
            for sequence, event in events:
                call = self._running[id(sequence)]
                if isinstance(event, Finished | Failed):
                    with self._changed:
                        del self._running[id(sequence)]
                        self._changed.notify_all()
                call.take(event)

    def _admit(self) -> bool:
        """Wait for work, and give free rows to waiting prompts; False once the engine is closed and idle."""
        with self._changed:
            while True:
                for call in self._waiting.remove(lambda waiting: waiting.sequence.cancelled):
                    call.take(call.sequence.finish("cancelled"))
                    self._changed.notify_all()
                if self.max_seconds is not None:
                    now = monotonic()
                    for call in (*self._running.values(), *self._waiting):
                        call.expire(now)
                while self._scheduler.room and len(self._waiting):
                    call = self._waiting.get()
                    self._running[id(call.sequence)] = call
                    self._scheduler.add(call.sequence)
                if self._scheduler.busy:
                    return True
                if self._closing:
                    return False
                self._changed.wait()

    def _begin_anew(self, error: Exception) -> bool:
        """After a fault in a step: fail the answers, and make new rows; False if it closes, or has none."""
        refusal = QrunError(f"the answer could not be completed: {type(error).__name__}: {error}")
        with self._changed:
            calls = list(self._running.values())
            self._running.clear()
            try:
                self._scheduler = self._new_scheduler()
            except Exception:
                _log.exception("there are no new rows: the engine ends")
                self._closing = True
                calls += self._waiting.remove(lambda waiting: True)
            self._changed.notify_all()
        for call in calls:
            call.fail(refusal)
        return not self._closing
