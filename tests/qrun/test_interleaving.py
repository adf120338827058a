"""If these fail, an answer depends on who else is being answered.

``QCONVERT_INTERLEAVINGS`` says how many are tried with each session (12 by default).
"""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qrun.backends import kvcache
from qrun.backends.opening import open_session
from qrun.decoding.prefix_cache import PrefixCache
from qrun.decoding.scheduler import Scheduler
from qrun.decoding.sequence import Failed, Finished, Sequence
from qrun.decoding.slots import Slots
from qrun.errors import QrunError
from qrun.sampling.params import SamplingParams
from tests.fakes import FakeSession, fake_manifest
from tests.qrun.interleaving import CHUNK, GRAIN, Request, differences, requests, run

INTERLEAVINGS = int(os.environ.get("QCONVERT_INTERLEAVINGS", "12"))
TRIED = settings(
    max_examples=INTERLEAVINGS,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
# What gives a row the same bits in any company. A vocabulary from 4,096 on has logits in two steps.
INVARIANT = {
    "fp32": {},
    "fp32, large vocabulary": {"vocab_size": 5_000},
    "fp32, 8-bit cache": {"int8_kv_cache": True},
    "int8": {"precision": "int8"},
    "int8, large vocabulary": {"precision": "int8", "vocab_size": 5_000},
    "int4 in blocks of 32": {"precision": "int4", "block_size": 32},
    "int4 in blocks of 32, large vocabulary": {"precision": "int4", "block_size": 32, "vocab_size": 5_000},
    "int4 in blocks of 32, graph for prompts and 8-bit cache": {
        "precision": "int4",
        "block_size": 32,
        "prefill": True,
        "int8_kv_cache": True,
        "vocab_size": 5_000,
    },
}
# The margin, under the logits of the sequence alone, between its token and another that it got in company.
NEAR_TIE = 0.5


def by_all_tokens(seen: list[int]) -> int:
    """Depends on every token and on its place."""
    value = 7
    for token_id in seen:
        value = (value * 31 + token_id + 1) % 1_000_003
    return value % 320


@pytest.fixture(scope="module", autouse=True)
def small_buffers():
    """So that rows grow while others are in use."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kvcache, "MINIMUM_CAPACITY", 12)
        yield


@TRIED
@given(asked=requests(320), rows=st.integers(1, 8), most_bytes=st.integers(0, 2_000))
def test_any_interleaving_gives_each_sequence_what_it_gets_alone(asked, rows, most_bytes):
    """Over a session whose rows share one buffer of logits, as the protocol allows."""
    for last_apart in (False, True):
        for prefixes in (None, PrefixCache(most_bytes, GRAIN)):
            session = FakeSession(by_all_tokens, last_apart=last_apart)
            assert list(differences(session, asked, rows, prefixes)) == []


@pytest.fixture(scope="module", params=list(INVARIANT))
def session(exporter, request):
    options = {"max_position_embeddings": 256, "hidden_size": 128, "intermediate_size": 256}
    opened = open_session(exporter(**{**options, **INVARIANT[request.param]}), threads=2)
    # Prompts here are short, and the second graph is for long ones: give it what it can get.
    if getattr(opened, "_prefill", None) is not None:
        opened._prefill.min_tokens = 4
    return opened


@TRIED
@given(data=st.data(), rows=st.integers(1, 8))
def test_real_sessions_give_the_same_bits_in_any_company(session, data, rows):
    asked = data.draw(requests(session.manifest.model.vocab_size))
    bytes_of_a_block = GRAIN * session.manifest.kv.bytes_per_token
    prefixes = PrefixCache(data.draw(st.integers(0, 20)) * bytes_of_a_block, GRAIN)
    assert list(differences(session, asked, rows, prefixes)) == []


@pytest.fixture(scope="module", params=[64, 128])
def long_blocks(exporter, request):
    options = {"max_position_embeddings": 256, "hidden_size": 256, "intermediate_size": 512}
    return open_session(exporter("int4", block_size=request.param, **options), threads=2)


@TRIED
@given(data=st.data(), rows=st.integers(2, 8))
def test_longer_blocks_differ_in_near_ties_alone(long_blocks, data, rows):
    """Their sums are added in another order for several rows, and 8-bit activations amplify that."""
    asked = data.draw(requests(long_blocks.manifest.model.vocab_size, greedy=True))
    for request, found in zip(asked, run(long_blocks, asked, rows)):
        alone = run(long_blocks, [Request(request.prompt_ids, request.params, 0)], 1)[0]
        for here, there, logits in zip(found.token_ids, alone.token_ids, alone.logits):
            if here != there:
                assert logits[there] - logits[here] < NEAR_TIE
                break


def test_the_cases_that_are_compared_can_differ(exporter):
    """Otherwise the comparisons above would show nothing: another prompt has other logits in every place."""
    session = open_session(exporter(max_position_embeddings=256), threads=2)
    params = SamplingParams(do_sample=False, max_tokens=4, ignore_eos=True)
    one, other = run(session, [Request((1, 2, 3), params, 0), Request((1, 2, 4), params, 0)], 2)
    assert not any(np.array_equal(here, there) for here, there in zip(one.logits, other.logits))


def test_a_row_keeps_only_whole_pieces_for_the_next_prompt():
    """What was read in other pieces, or token by token, may differ in the last bits."""
    slots = Slots(FakeSession(by_all_tokens), 1)
    prompt = list(range(2 * CHUNK + 3))
    params = SamplingParams(do_sample=False, max_tokens=6, ignore_eos=True)
    for expected in (0, 2 * CHUNK):
        scheduler = Scheduler(slots, chunk=CHUNK, grain=GRAIN)
        scheduler.add(Sequence(prompt, params, 256))
        events = []
        while scheduler.busy:
            events += [event for _, event in scheduler.step()]
        last = events[-1]
        assert isinstance(last, Finished)
        assert last.reused_tokens == expected


def test_a_beginning_that_another_row_has_read_is_not_read_again():
    """Two prompts with the same 20 tokens: the second one finds both pieces, wherever the first one went."""
    session, prefixes = FakeSession(by_all_tokens), PrefixCache(1 << 20, GRAIN)
    params = SamplingParams(do_sample=False, max_tokens=2, ignore_eos=True)
    shared = tuple(range(100, 121))
    first, *_ = run(session, [Request((*shared, 1, 2), params, 0)], 1, prefixes=prefixes)
    second, *_ = run(session, [Request((*shared, 3), params, 0)], 1, prefixes=prefixes)
    assert (first.last.reused_tokens, second.last.reused_tokens) == (0, 16)
    assert (prefixes.hits, len(prefixes), prefixes.nbytes) == (16, 4, 4 * GRAIN * 8)


def test_the_least_recently_used_beginning_goes_first():
    session, prefixes = FakeSession(by_all_tokens), PrefixCache(6 * GRAIN * 8, GRAIN)
    params = SamplingParams(do_sample=False, max_tokens=1, ignore_eos=True)

    def reused(seed: int) -> int:
        prompt = tuple(np.random.default_rng(seed).integers(0, 320, 21).tolist())
        return run(session, [Request(prompt, params, 0)], 1, prefixes=prefixes)[0].last.reused_tokens

    assert [reused(seed) for seed in (1, 1, 2, 2)] == [0, 16, 0, 16]
    assert reused(1) < 16  # six blocks of the two prompts' eight are left
    assert prefixes.nbytes <= 6 * GRAIN * 8


def test_a_step_that_fails_ends_those_that_took_part_and_nobody_else():
    """Three sequences, one decoding step of two rows fails: these end, the one that waits is answered."""

    class Failing(FakeSession):
        def forward(self, token_ids, cache, logits="last"):
            if token_ids.shape[0] == 2:
                raise QrunError("out of memory")
            return super().forward(token_ids, cache, logits)

    params = SamplingParams(do_sample=False, max_tokens=5, ignore_eos=True)
    asked = [Request((1, 2, 3), params, 0), Request((4, 5), params, 0), Request((6,), params, 0)]
    first, second, third = run(Failing(by_all_tokens, fake_manifest()), asked, 2)
    assert isinstance(first.last, Failed)
    assert isinstance(second.last, Failed)
    assert isinstance(third.last, Finished)
    assert len(third.token_ids) == 5
