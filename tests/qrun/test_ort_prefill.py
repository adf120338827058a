"""If these fail, a prompt's keys and values by the second graph are not those that the first one needs."""

from __future__ import annotations

import numpy as np
import pytest

from qrun.backends.opening import open_session
from qrun.backends.ort.prefill import PrefillGraph
from qrun.backends.ort.session import OrtSession
from qrun.decoding.generate import Context, Prefilled, Token, generate
from qrun.sampling.sampler import SamplingParams
from tests.qrun.prefilling import TOKENS, close, keys_and_values


@pytest.fixture(scope="module")
def folder(exporter):
    return exporter("int8", prefill=True, block_size=64, max_position_embeddings=1024)


@pytest.fixture
def session(folder) -> OrtSession:
    opened = open_session(folder, threads=2)
    assert isinstance(opened, OrtSession)
    return opened


@pytest.fixture
def reads(monkeypatch) -> list[int]:
    """Tokens that each run of the second graph was given."""
    counts: list[int] = []
    read = PrefillGraph.read

    def counted(self, token_ids, cache):
        counts.append(token_ids.shape[1])
        read(self, token_ids, cache)

    monkeypatch.setattr(PrefillGraph, "read", counted)
    return counts


@pytest.fixture
def due(session) -> np.ndarray:
    """Keys and values by the first graph, which alone knows logits for all positions."""
    cache = session.new_cache()
    session.forward(TOKENS, cache, "all")
    return keys_and_values(cache)


@pytest.mark.parametrize("sizes", [[300], [100, 200], [40, 5, 255], [256, 44]], ids=str)
def test_both_graphs_leave_the_same_keys_and_values(session, due, reads, sizes):
    """Pieces of fewer than ``min_tokens`` go through the first graph, after and before longer ones."""
    cache, start = session.new_cache(), 0
    for size in sizes:
        assert session.forward(TOKENS[:, start : start + size], cache, "none").shape == (1, 0, 320)
        start += size
        assert cache.length == start
    assert reads == [size for size in sizes if size >= 32]
    assert close(keys_and_values(cache), due)


@pytest.fixture
def of_8_bits(exporter) -> OrtSession:
    """A session whose prompts are read by the float kernel, and whose cache holds codes."""
    folder = exporter("int8", prefill=True, block_size=64, int8_kv_cache=True, max_position_embeddings=1024)
    opened = open_session(folder, threads=2)
    assert isinstance(opened, OrtSession)
    return opened


def codes_of(session, sizes, tokens=TOKENS, cache=None) -> np.ndarray:
    cache, start = session.new_cache(len(tokens)) if cache is None else cache, 0
    for size in sizes:
        session.forward(tokens[:, start : start + size], cache, "none")
        start += size
    return keys_and_values(cache).astype(np.float32)


@pytest.mark.parametrize("sizes", [[100, 200], [40, 5, 255], [256, 44]], ids=str)
def test_a_cache_of_8_bits_is_read_back_between_pieces(of_8_bits, reads, sizes):
    """New tokens see the rounded keys of their own piece, so that pieces and a whole give the same."""
    whole, pieces = codes_of(of_8_bits, [300]), codes_of(of_8_bits, sizes)
    assert reads == [300, *(size for size in sizes if size >= 32)]
    first = slice(sizes[0]) if min(sizes) >= 32 else slice(40)  # the graph that decodes rounds otherwise
    assert np.abs(pieces[:, :, :, first] - whole[:, :, :, first]).max() <= 1
    if min(sizes) >= 32:
        assert (pieces == whole).mean() > 0.98
    turned = np.concatenate([TOKENS[:, : sizes[0]][:, ::-1], TOKENS[:, sizes[0] :]], 1)
    other = codes_of(of_8_bits, sizes, turned)
    layers = slice(2, None)  # the first layer's keys and values do not depend on other tokens
    assert (other[layers, :, :, sizes[0] :] == whole[layers, :, :, sizes[0] :]).mean() < 0.5


def test_a_cache_of_8_bits_is_cut_back_and_grows(of_8_bits):
    cache = of_8_bits.new_cache()
    codes_of(of_8_bits, [300], TOKENS[:, ::-1], cache)
    cache.trim(0)
    codes_of(of_8_bits, [200], TOKENS, cache)
    of_8_bits.forward(TOKENS[:, :40], cache, "none")
    cache.trim(200)
    of_8_bits.forward(TOKENS[:, 200:], cache, "none")
    assert (keys_and_values(cache) == codes_of(of_8_bits, [300])).mean() > 0.98


def test_two_sequences_at_once_in_8_bits(of_8_bits):
    both = codes_of(of_8_bits, [300], np.concatenate([TOKENS, TOKENS[:, ::-1]]))
    for row, tokens in enumerate((TOKENS, TOKENS[:, ::-1])):
        assert (both[:, row : row + 1] == codes_of(of_8_bits, [300], tokens)).mean() > 0.98


def test_a_cache_of_8_bits_is_shared_too(of_8_bits, reads):
    """Codes of both graphs mean the same: another scale, or none, would be far off."""
    session = of_8_bits
    first, second = session.new_cache(), session.new_cache()
    session.forward(TOKENS, first, "all")
    session.forward(TOKENS, second, "none")
    assert reads == [300]
    codes = [keys_and_values(cache).astype(np.float32) for cache in (first, second)]
    assert np.abs(codes[0]).max() <= 128
    assert close(codes[1], codes[0])
    assert not close(np.roll(codes[1], 1, axis=3), codes[0])


def test_a_shifted_prompt_is_told_apart(session, due):
    """Otherwise the tolerance above would show nothing."""
    cache = session.new_cache()
    session.forward(np.roll(TOKENS, 1), cache, "none")
    assert not close(keys_and_values(cache), due)


def test_the_last_token_has_logits(session, reads):
    logits = session.forward(TOKENS, session.new_cache(), "last")[0, 0].copy()
    assert reads == [299]
    cache = session.new_cache()
    true = session.forward(TOKENS, cache, "all")[0]
    wrong = np.abs(true[-2] - true[-1]).mean()
    assert np.abs(logits - true[-1]).mean() < 0.3 * wrong


def test_short_prompts_growing_caches_and_all_logits_use_the_first_graph(session, reads):
    session.forward(TOKENS[:, :24], session.new_cache(), "last")
    session.forward(TOKENS, session.new_cache(in_place=False), "none")
    session.forward(TOKENS, session.new_cache(), "all")
    assert reads == []


def test_a_cut_back_cache_is_continued(session, due, reads):
    cache = session.new_cache()
    session.forward(TOKENS[:, ::-1], cache, "none")
    cache.trim(0)
    session.forward(TOKENS[:, :200], cache, "none")
    session.forward(TOKENS[:, :40], cache, "none")
    cache.trim(200)
    session.forward(TOKENS[:, 200:], cache, "none")  # past 256 tokens the buffers have grown
    assert reads == [300, 200, 40, 100]
    assert close(keys_and_values(cache), due)


def test_two_sequences_at_once(session, due):
    cache = session.new_cache(batch=2)
    session.forward(np.concatenate([TOKENS, TOKENS[:, ::-1]]), cache, "none")
    both = keys_and_values(cache)
    assert close(both[:, :1], due)
    assert not close(both[:, 1:], due)


def test_generation_prefills_with_it(session, reads):
    events = list(
        generate(
            Context(session), TOKENS[0].tolist(), SamplingParams(max_tokens=3, ignore_eos=True), chunk=128
        )
    )
    # The last token has logits: it is fed in a step, beside those of other answers where there are any.
    assert [event.done for event in events if isinstance(event, Prefilled)] == [0, 128, 256, 299, 300]
    assert reads == [128, 128, 43]
    assert sum(isinstance(event, Token) for event in events) == 3


def test_without_the_second_graph_nothing_of_it_is_opened(folder, reads):
    session = open_session(folder, prefill_graph=False)
    session.forward(TOKENS, session.new_cache(), "none")
    assert reads == []
