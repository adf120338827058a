"""If these fail, an application that embeds the engine waits for ever, or gets another's answer."""

from __future__ import annotations

import asyncio
import threading

import pytest

import qrun
from qrun.answer import Wording
from qrun.call import EngineBusyError, EngineClosedError
from qrun.decoding.fair_queue import FairQueue
from qrun.decoding.sequence import Sequence
from qrun.engine import Engine
from qrun.errors import QrunError
from tests.fakes import IM_END, fake_manifest, fake_model, repeating, scripted


async def text_of(events) -> str:
    return "".join([event.text async for event in events if isinstance(event, qrun.Piece)])


def test_an_application_follows_several_answers_at_once(tokenizer):
    async def ask(engine):
        asked = (engine.chat([{"role": "user", "content": letter * 9}]) for letter in "xyz")
        return await asyncio.gather(*map(text_of, asked))

    model = fake_model(tokenizer, scripted(tokenizer, ["an answer"]))
    with Engine(model, slots=2) as engine:
        assert asyncio.run(ask(engine)) == ["an answer"] * 3
        assert (engine.active, engine.queued) == (0, 0)


def test_whoever_leaves_the_loop_gives_the_slot_back(tokenizer):
    async def leave(engine):
        events = engine.generate("x")
        async for event in events:
            if isinstance(event, qrun.Piece):
                break
        await events.aclose()
        async for event in engine.generate("y", max_tokens=2):
            last = event
        return last

    model = fake_model(tokenizer, repeating(tokenizer, "ab"), manifest=fake_manifest(context_length=4096))
    with Engine(model, slots=1) as engine:
        assert asyncio.run(leave(engine)).completion_tokens == 2


def test_a_fault_in_one_answer_ends_no_other(tokenizer, monkeypatch, caplog):
    """A fault while its token was chosen ended all answers, one while it was told the engine's thread."""
    model = fake_model(tokenizer, repeating(tokenizer, "ab"), manifest=fake_manifest(context_length=4096))
    choose, push = Sequence.choose, Wording.push

    def choosing(self, logits):
        assert self.prompt_ids != [1, 1] or len(self.token_ids) < 3, "a fault of ours"
        return choose(self, logits)

    def telling(self, token_id):
        assert len(self.token_ids) < 3 or self._stops._stop != ("never",), "another"
        return push(self, token_id)

    monkeypatch.setattr(Sequence, "choose", choosing)
    monkeypatch.setattr(Wording, "push", telling)

    async def one(engine, prompt, **more):
        try:
            async for event in engine.generate(prompt, max_tokens=8, ignore_eos=True, **more):
                last = event
        except QrunError as error:
            return str(error.what)
        return last.completion_tokens

    async def ask(engine):
        asked = (one(engine, [1, 1]), one(engine, [2, 2], stop=["never"]), one(engine, [3, 3]))
        return await asyncio.gather(*asked), await one(engine, [4, 4])

    with Engine(model, slots=3) as engine:
        (chosen, told, other), later = asyncio.run(ask(engine))
        assert (engine.active, engine.queued) == (0, 0)
    assert "a fault of ours" in chosen
    assert "another" in told
    assert (other, later) == (8, 8)
    assert len([record for record in caplog.records if record.exc_info]) == 2


def test_a_listener_that_fails_ends_its_own_answer(tokenizer, caplog):
    """It ended the engine's thread, and everybody waited for ever."""
    model = fake_model(tokenizer, repeating(tokenizer, "ab"), manifest=fake_manifest(context_length=4096))
    params, _ = model.resolve({})

    def failing(event):
        raise ValueError("a fault of the caller's")

    with Engine(model, slots=1) as engine:
        engine.submit([1, 2], params, failing)
        assert asyncio.run(text_of(engine.generate([3, 4], max_tokens=2)))
        assert (engine.active, engine.queued) == (0, 0)
    assert [record for record in caplog.records if record.exc_info]


def test_a_prompt_that_waits_can_be_cancelled(tokenizer):
    model = fake_model(tokenizer, repeating(tokenizer, "ab"), manifest=fake_manifest(context_length=4096))
    found = []
    params, _ = model.resolve({})
    with Engine(model, slots=1) as engine:
        running = engine.submit([1, 2], params, lambda event: None)
        waiting = engine.submit([3, 4], params, found.append)
        engine.cancel(waiting)
        engine.cancel(running)
    assert found[-1].finish_reason == "cancelled"


def test_a_full_queue_and_a_closed_engine_are_told_apart(tokenizer):
    model = fake_model(tokenizer, repeating(tokenizer, "ab"), manifest=fake_manifest(context_length=4096))
    params, _ = model.resolve({})
    engine = Engine(model, slots=1, queue=0)
    engine.submit([1], params, lambda event: None)
    with pytest.raises(EngineBusyError):
        engine.submit([1], params, lambda event: None)
    engine.close()
    with pytest.raises(EngineClosedError):
        engine.submit([1], params, lambda event: None)
    with pytest.raises(QrunError, match="0 slots"):
        Engine(model, slots=0)


def test_closing_lets_running_answers_end(tokenizer):
    model = fake_model(
        tokenizer, lambda seen: IM_END if len(seen) > 500 else 7, manifest=fake_manifest(context_length=4096)
    )
    found = []
    params, _ = model.resolve({})
    engine = Engine(model, slots=2)
    for _ in range(3):
        engine.submit([1], params, found.append)
    engine.close(drain_seconds=30)
    assert [event.finish_reason for event in found if isinstance(event, qrun.Answer)] == ["eos"] * 3


def test_clients_take_turns():
    queue = FairQueue[str]()
    for item in ("a1", "a2", "a3", "b1", "c1", "c2"):
        queue.put(item[0], item)
    assert len(queue) == 6
    assert queue.remove(lambda item: item == "a2") == ["a2"]
    assert [queue.get() for _ in range(5)] == ["a1", "b1", "c1", "a3", "c2"]
    with pytest.raises(IndexError):
        queue.get()


def test_forms_compile_in_a_pool_and_fit_side_by_side(tokenizer, monkeypatch):
    """Neither in the thread that steps the model nor in the one that serves all callers."""
    model = fake_model(tokenizer, repeating(tokenizer, "x"))
    made, threads = model.constraint, []

    def constraint(**asked):
        threads.append(threading.current_thread().name)
        return made(**asked)

    monkeypatch.setattr(model, "constraint", constraint)

    async def ask(engine, number):
        *_, one = [event async for event in engine.generate("hi", regex=f"[xy]{{{number}}}")]
        *_, two = [
            event async for event in engine.chat([{"role": "user", "content": "?"}], schema={"const": number})
        ]
        return one.text, two.text

    async def main():
        with Engine(model, slots=3) as engine:
            return await asyncio.gather(*(ask(engine, number) for number in range(1, 8)))

    found = asyncio.run(main())
    assert [(len(one), two) for one, two in found] == [(number, str(number)) for number in range(1, 8)]
    assert len(threads) == 14
    assert all(name.startswith("asyncio") for name in threads)
