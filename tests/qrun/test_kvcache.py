"""If these fail, the KV cache loses entries when it grows, or takes memory that is not there."""

from __future__ import annotations

import numpy as np
import pytest

from qrun.backends import kvcache, ledger
from qrun.backends.kvcache import MINIMUM_CAPACITY, next_capacity
from qrun.backends.ledger import Ledger
from qrun.decoding.generate import Context, generate
from qrun.decoding.slots import Slots
from qrun.errors import QrunError
from qrun.folder.manifest import forecast_bytes
from qrun.sampling.params import SamplingParams
from tests.fakes import FakeKVCache, FakeSession, fake_manifest


@pytest.fixture(autouse=True)
def own_ledger(monkeypatch) -> None:
    """A ledger for each test, so that caches of other tests do not count."""
    monkeypatch.setattr(kvcache, "LEDGER", Ledger())


def cache_of(context_length: int = 4096, batch: int = 1) -> FakeKVCache:
    return FakeKVCache(fake_manifest(context_length=context_length), batch)


def fill(cache: FakeKVCache, count: int) -> None:
    cache.reserve(count)
    cache.ids[:, cache.length : cache.length + count] = np.arange(cache.length, cache.length + count)
    cache.advance(count)


@pytest.mark.parametrize(
    ("needed", "current", "limit", "expected"),
    [
        (1, 0, 4096, MINIMUM_CAPACITY),
        (300, 0, 4096, 300),
        (257, 256, 4096, 321),
        (2001, 2000, 4096, 2251),
        (3000, 2048, 4096, 3256),
        (4000, 3999, 4096, 4096),
        (10, 0, 64, 64),
    ],
)
def test_capacity_grows_by_an_eighth_suffices_and_stays_within_the_context(needed, current, limit, expected):
    assert next_capacity(needed, current, limit) == expected


def test_growing_keeps_what_is_cached():
    cache = cache_of()
    for _ in range(5):
        fill(cache, 300)
    assert cache.length == 1500
    assert cache.capacity >= 1500
    assert cache.ids[0, :1500].tolist() == list(range(1500))


def test_room_that_is_there_is_not_allocated_again():
    cache = cache_of()
    fill(cache, 10)
    before = cache._ids
    fill(cache, MINIMUM_CAPACITY - 10)
    assert cache._ids is before
    fill(cache, 1)
    assert cache._ids is not before


def test_trimming_forgets_the_end_and_cannot_lengthen():
    cache = cache_of()
    fill(cache, 20)
    cache.trim(5)
    assert cache.length == 5
    with pytest.raises(ValueError, match="cannot trim a cache of 5 tokens to 6"):
        cache.trim(6)
    with pytest.raises(ValueError, match="to -1"):
        cache.trim(-1)


def test_trimming_leaves_shorter_rows_alone():
    cache = cache_of(batch=2)
    fill(cache, 10)
    cache.lengths[:] = (3, 10)
    cache.trim(6)
    assert cache.lengths.tolist() == [3, 6]


def test_the_context_length_is_the_end():
    cache = cache_of(context_length=100)
    fill(cache, 100)
    with pytest.raises(QrunError, match="101 tokens do not fit: fake has a context of 100"):
        cache.reserve(1)
    assert cache.length == 100


def test_bytes_are_those_of_all_rows_and_all_of_the_capacity():
    manifest = fake_manifest()
    assert forecast_bytes(manifest, 10, batch=3) == manifest.kv.bytes_per_token * 30
    cache = cache_of(batch=2)
    fill(cache, 1)
    assert cache.nbytes == forecast_bytes(cache.manifest, MINIMUM_CAPACITY, 2)


def test_too_little_memory_is_told_before_anything_is_allocated(monkeypatch):
    cache = cache_of()
    monkeypatch.setattr(ledger, "available_memory", lambda: cache.manifest.kv.bytes_per_token * 999)
    with pytest.raises(QrunError, match=r"a KV cache of 1,000 tokens needs 0\.00 GB, 0\.00 GB .* free"):
        cache.reserve(1000)
    assert (cache.capacity, cache.ids.shape) == (0, (1, 0))


def test_two_caches_are_not_promised_the_same_memory(monkeypatch):
    """Pages that nobody has written yet are still reported as free."""
    first, second = cache_of(), cache_of()
    monkeypatch.setattr(ledger, "available_memory", lambda: second.manifest.kv.bytes_per_token * 1500)
    first.reserve(1000)
    with pytest.raises(QrunError, match="a KV cache of 1,000 tokens needs"):
        second.reserve(1000)
    assert second.capacity == 0
    del first
    second.reserve(1000)
    assert second.capacity == 1000


def test_where_room_to_spare_does_not_fit_what_is_needed_still_may(monkeypatch):
    cache = cache_of()
    fill(cache, 1000)
    per_token = cache.manifest.kv.bytes_per_token
    monkeypatch.setattr(ledger, "available_memory", lambda: per_token * 1100)
    fill(cache, 1)
    assert cache.capacity == 1001
    assert cache.ids[0, :1001].tolist() == list(range(1001))


def test_a_machine_that_does_not_tell_its_memory_is_believed_to_have_enough(monkeypatch):
    monkeypatch.setattr(ledger, "available_memory", lambda: None)
    cache = cache_of()
    cache.reserve(4000)
    assert cache.capacity == 4000


def test_room_without_spare_is_exactly_what_is_needed():
    cache = cache_of()
    fill(cache, 300)
    cache.reserve(700, spare=0)
    assert cache.capacity == 1000
    assert cache.ids[0, :300].tolist() == list(range(300))


def test_only_a_cache_whose_capacity_decides_is_cut_to_fit():
    cache = cache_of()
    fill(cache, 300)
    cache.reserve(1700, spare=0)
    cache.fit(400)
    assert cache.capacity == 2000
    cache.chooses_by_capacity = True
    cache.fit(400)
    assert cache.capacity == 400
    assert cache.ids[0, :300].tolist() == list(range(300))
    cache.fit(1000)  # there is no room that could be given back
    assert cache.capacity == 400


def test_a_cache_that_cannot_be_cut_stays_as_it_is(monkeypatch):
    cache = cache_of()
    cache.chooses_by_capacity = True
    fill(cache, 2000)
    cache.trim(300)

    def full(capacity: int) -> None:
        raise MemoryError

    monkeypatch.setattr(cache, "_reallocate", full)
    cache.fit(400)
    assert cache.capacity == 2000
    assert cache.ids[0, :300].tolist() == list(range(300))


@pytest.mark.parametrize(
    ("prompt", "answer", "held", "capacity"),
    [
        (1000, 10, 0, 1010),
        (1000, 4000, 0, 1064),
        (3200, 4000, 0, 3400),
        (4090, 100, 0, 4096),
        (10, 1, 0, 256),
    ],
)
def test_a_row_has_room_for_a_prompt_and_the_first_of_its_answer(prompt, answer, held, capacity):
    slots = Slots(FakeSession(len, fake_manifest(context_length=4096)))
    slots.prepare(0, prompt, answer)
    assert slots.cache.capacity == capacity
    assert slots.cache.length == held


def test_a_prompt_that_memory_has_no_room_for_is_refused_before_any_of_it_is_read(monkeypatch):
    session = FakeSession(len, fake_manifest(context_length=4096))
    per_token = session.manifest.kv.bytes_per_token
    monkeypatch.setattr(ledger, "available_memory", lambda: per_token * 999)
    context = Context(session)
    with pytest.raises(QrunError, match=r"a KV cache of 1,0\d\d tokens needs"):
        list(generate(context, list(range(40)) * 25, SamplingParams(max_tokens=20)))
    assert context.cache.length == 0


def test_a_prompt_that_fits_is_read_where_there_is_no_room_for_the_answers_beginning(monkeypatch):
    session = FakeSession(len, fake_manifest(context_length=4096))
    slots = Slots(session)
    per_token = session.manifest.kv.bytes_per_token
    monkeypatch.setattr(ledger, "available_memory", lambda: per_token * 1010)
    slots.prepare(0, 1000, 500)
    assert slots.cache.capacity == 1000
    slots.prepare(0, 1000, 500)  # once more: what is there suffices
    assert slots.cache.capacity == 1000
