"""If these fail, a plan answers otherwise than the graph that it was built from, or keeps what it took."""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pytest

from qrun.backends.opening import open_session
from qrun.backends.session import Session
from qrun.backends.trt.session import TrtSession
from qrun.decoding.generate import Context, Finished, Token, generate
from qrun.errors import QrunError
from qrun.sampling.params import SamplingParams
from tests.emulated.device import EmulatedDevice
from tests.trt.conftest import LENGTH, PROMPT_LENGTH

TOKENS = np.random.default_rng(0).integers(0, 256, LENGTH, dtype=np.int64)


def row(token_ids: object) -> np.ndarray:
    return np.asarray(token_ids, dtype=np.int64)[None]


def opened(plan: Path, **options: bool) -> TrtSession:
    session = open_session(plan, **options)
    assert isinstance(session, TrtSession)
    return session


def on_cpu(plan: Path) -> Session:
    return open_session(plan.parent, threads=2)


def greedy(session: Session, prompt: list[int], count: int | None, chunk: int = 256) -> list[int]:
    events = generate(Context(session), prompt, SamplingParams(max_tokens=count), chunk=chunk)
    return [event.token_id for event in events if isinstance(event, Token)]


@pytest.mark.parametrize("chunk", [256, 7], ids=["prompt whole", "prompt in pieces of the loop"])
@pytest.mark.parametrize(
    ("length", "count"),
    [(1, 24), (PROMPT_LENGTH, 24), (2 * PROMPT_LENGTH + 1, 24), (40, None), (LENGTH, None)],
    ids=["one token", "profile limit", "beyond it", "until the cache is full", "a prompt that fills it"],
)
def test_greedy_tokens_are_those_of_the_onnx_runtime_path(
    plan: Path, device: EmulatedDevice, length: int, count: int | None, chunk: int
) -> None:
    prompt = TOKENS[:length].tolist()
    with opened(plan) as session:
        tokens = greedy(session, prompt, count, chunk)
    assert tokens == greedy(on_cpu(plan), prompt, count, chunk)
    assert len(tokens) == (count or LENGTH - length + 1)


@pytest.mark.parametrize("sizes", [[40], [16, 16, 8], [1] * 40, [39, 1], [1, 39], [17, 1, 22]], ids=str)
def test_whole_in_pieces_and_token_by_token_are_alike(
    plan: Path, device: EmulatedDevice, sizes: list[int]
) -> None:
    cpu = on_cpu(plan)
    expected = cpu.forward(row(TOKENS[:40]), cpu.new_cache(), "all")[0]
    with opened(plan) as session:
        cache, start = session.new_cache(), 0
        for size in sizes:
            logits = session.forward(row(TOKENS[start : start + size]), cache, "all")
            np.testing.assert_allclose(logits[0], expected[start : start + size], atol=2e-4)
            start += size
        assert cache.length == 40


@pytest.mark.parametrize("positions", [1, 3, 64])
def test_last_none_and_all_give_the_positions_they_name(
    make_plan: Callable[..., Path], device: EmulatedDevice, positions: int
) -> None:
    plan = make_plan(positions=positions)
    cpu = on_cpu(plan)
    expected = cpu.forward(row(TOKENS[:45]), cpu.new_cache(), "all")[0]
    with opened(plan) as session:
        cache = session.new_cache()
        assert session.forward(row(TOKENS[:20]), cache, "none").shape == (1, 0, 320)
        last = session.forward(row(TOKENS[20:25]), cache, "last")
        assert last.shape == (1, 1, 320)
        np.testing.assert_allclose(last[0, 0], expected[24], atol=2e-4)
        all_of_them = session.forward(row(TOKENS[25:45]), cache, "all")
        np.testing.assert_allclose(all_of_them[0], expected[25:], atol=2e-4)


def test_a_trimmed_cache_goes_on_as_if_the_rest_had_never_been(plan: Path, device: EmulatedDevice) -> None:
    with opened(plan) as session:
        whole = session.forward(row(TOKENS[:40]), session.new_cache(), "all")[0]
        cache = session.new_cache()
        session.forward(row(TOKENS[:25]), cache, "none")
        for token in range(8):
            session.forward(row([token]), cache)
        cache.trim(20)
        np.testing.assert_allclose(
            session.forward(row(TOKENS[20:40]), cache, "all")[0], whole[20:], atol=2e-4
        )
        cache.trim(0)
        np.testing.assert_allclose(session.forward(row(TOKENS[:40]), cache, "all")[0], whole, atol=2e-4)


def test_two_caches_of_one_session_do_not_disturb_each_other(plan: Path, device: EmulatedDevice) -> None:
    """The decode step's graph holds the addresses of one cache; the other must not be fed through it."""
    with opened(plan) as session:
        cpu = on_cpu(plan)
        expected = cpu.forward(row(TOKENS[:24]), cpu.new_cache(), "all")[0]
        left, right = session.new_cache(), session.new_cache()
        session.forward(row(TOKENS[:10]), left, "none")
        session.forward(row(TOKENS[50:60]), right, "none")
        for step in range(10, 14):
            logits = session.forward(row([TOKENS[step]]), left)
            np.testing.assert_allclose(logits[0, 0], expected[step], atol=2e-4)
        for step in range(14, 24):
            session.forward(row([TOKENS[step + 50]]), right)
            logits = session.forward(row([TOKENS[step]]), left)
            np.testing.assert_allclose(logits[0, 0], expected[step], atol=2e-4)


def test_two_answers_of_one_session_by_turns_are_each_as_alone(plan: Path, device: EmulatedDevice) -> None:
    """Between two events of one answer the other one steps: they had drawn from each other's logits."""
    prompts = [TOKENS[:10].tolist(), TOKENS[50:73].tolist()]
    with opened(plan) as session:
        params = SamplingParams(max_tokens=12)
        running = [generate(Context(session), prompt, params) for prompt in prompts]
        found: list[list[int]] = [[], []]
        for events in zip_longest(*running):
            for tokens, event in zip(found, events):
                if isinstance(event, Token):
                    tokens.append(event.token_id)
    alone = [greedy(on_cpu(plan), prompt, 12) for prompt in prompts]
    assert found == alone
    assert alone[0] != alone[1]


def test_decode_steps_after_the_first_are_one_graph_launch(plan: Path, device: EmulatedDevice) -> None:
    with opened(plan) as session:
        assert session.graph_state == "not yet"
        cache = session.new_cache()
        for token in TOKENS[:10]:
            session.forward(row([token]), cache)
        assert (session.graph_state, device.graph_launches, device.runs) == ("captured", 9, 10)
        session.forward(row(TOKENS[10:20]), cache)  # a prompt between two steps costs the graph nothing
        session.forward(row(TOKENS[20:21]), cache)
        assert device.graph_launches == 10


@pytest.mark.parametrize(
    ("change", "state"),
    [
        ({}, "captured"),
        ({"capturable": False}, "not yet"),
        ({"breaks_captures": True}, "refused: cudaStreamEndCapture failed"),
    ],
    ids=["captured", "not capturable", "capture fails"],
)
def test_with_or_without_a_graph_the_tokens_are_the_same(
    plan: Path, device: EmulatedDevice, change: dict[str, bool], state: str
) -> None:
    for name, value in change.items():
        setattr(device, name, value)
    prompt = TOKENS[:20].tolist()
    with opened(plan, cuda_graph=False) as session:
        plain = greedy(session, prompt, 30)
        assert (session.graph_state, device.graph_launches) == ("off", 0)
    with opened(plan) as session:
        assert greedy(session, prompt, 30) == plain
        assert session.graph_state.startswith(state)
        assert bool(device.graph_launches) == (state == "captured")


def test_the_last_logits_outlive_the_session(plan: Path, device: EmulatedDevice) -> None:
    """They are not the page-locked array, which is gone by then."""
    with opened(plan) as session:
        logits = session.forward(row(TOKENS[:20]), session.new_cache())
        before = logits.copy()
    np.testing.assert_array_equal(logits, before)


def test_everything_is_given_back_by_close_or_with_the_last_reference(
    plan: Path, device: EmulatedDevice
) -> None:
    session = opened(plan)
    cache = session.new_cache()
    session.forward(row(TOKENS[:20]), cache)
    session.forward(row(TOKENS[20:21]), cache)
    session.forward(row(TOKENS[21:22]), cache)
    used = device.used_bytes()
    del cache
    gc.collect()
    assert device.used_bytes() < used  # a cache goes alone, too
    assert session.forward(row(TOKENS[:1]), session.new_cache()).shape == (1, 1, 320)
    del session
    gc.collect()
    device.check_nothing_left()

    session = opened(plan)
    cache = session.new_cache()
    session.forward(row(TOKENS[:20]), cache)
    session.close()
    session.close()
    device.check_nothing_left()
    with pytest.raises(AssertionError, match="the session is closed"):
        session.forward(row([1]), cache)


def test_the_cache_is_its_forecast_and_is_taken_once(plan: Path, device: EmulatedDevice) -> None:
    with opened(plan) as session:
        cache = session.new_cache()
        empty = device.used_bytes()
        session.forward(row(TOKENS[:3]), cache)
        assert device.used_bytes() - empty == cache.nbytes == session.manifest.kv.bytes_per_token * LENGTH
        full = device.used_bytes()
        session.forward(row(TOKENS[3:LENGTH]), cache)
        assert device.used_bytes() == full


def test_the_context_length_is_the_end_of_the_cache(plan: Path, device: EmulatedDevice) -> None:
    """TensorRT itself ignores writes past the end without a word."""
    with opened(plan) as session:
        cache = session.new_cache()
        session.forward(row(TOKENS), cache, "none")
        with pytest.raises(
            QrunError, match=f"{LENGTH + 1} tokens do not fit: tiny has a context of {LENGTH}"
        ):
            session.forward(row([1]), cache)
        assert cache.length == LENGTH


def test_what_a_plan_cannot_do_is_refused(plan: Path, device: EmulatedDevice) -> None:
    with opened(plan) as session:
        cache = session.new_cache()
        with pytest.raises(QrunError, match="one sequence at a time, not 2"):
            session.new_cache(batch=2)
        with pytest.raises(QrunError, match="one sequence at a time, not 2"):
            session.forward(np.zeros((2, 3), dtype=np.int64), cache)
        with pytest.raises(QrunError, match="fixed length"):
            session.new_cache(in_place=False)
        for token_id in (-1, 320, 10**9):
            with pytest.raises(QrunError, match=f"token id {token_id} is outside the vocabulary of 320"):
                session.forward(row([1, token_id]), cache)
        with pytest.raises(QrunError, match="no token ids"):
            session.forward(row([]), cache)
        assert cache.length == 0


def test_a_run_that_tensorrt_refuses_tells_its_words_and_leaves_the_cache(
    plan: Path, device: EmulatedDevice
) -> None:
    with opened(plan) as session:
        cache = session.new_cache()
        first = session.forward(row(TOKENS[:20]), cache).copy()
        device.refuses_runs = "[myelin] illegal instruction"
        with pytest.raises(QrunError, match=r"could not run the plan:\n.*illegal instruction"):
            session.forward(row(TOKENS[20:40]), cache)
        assert cache.length == 20
        device.refuses_runs = None
        cache.trim(0)
        np.testing.assert_array_equal(session.forward(row(TOKENS[:20]), cache), first)


def test_finished_says_context_when_the_cache_is_full(plan: Path, device: EmulatedDevice) -> None:
    with opened(plan) as session:
        *_, last = generate(Context(session), TOKENS[:150].tolist(), SamplingParams())
    assert isinstance(last, Finished)
    assert (last.reason, last.completion_tokens) == ("context", LENGTH - 150 + 1)
