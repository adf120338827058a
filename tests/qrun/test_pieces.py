"""If these fail, what is reused of an earlier prompt is not what reading it gives, or others wait long."""

from __future__ import annotations

import numpy as np
import pytest

from qrun.backends.opening import open_session
from qrun.decoding.pieces import GRAIN, PIECE, Pieces
from qrun.decoding.prefix_cache import PrefixCache
from qrun.decoding.scheduler import Scheduler
from qrun.decoding.sequence import Finished, Sequence
from qrun.decoding.slots import Slots
from qrun.sampling.params import SamplingParams
from tests.fakes import FakeSession
from tests.qrun.interleaving import Recorded

GREEDY = SamplingParams(do_sample=False, max_tokens=3, ignore_eos=True)


@pytest.mark.parametrize("length", [64, 128, 192, 256])
def test_cuts_are_where_blocks_end_and_pieces_are_half_as_long_behind_many(length):
    pieces, cuts = Pieces(length), [0]
    while cuts[-1] < 8_192:
        cuts.append(pieces.end(cuts[-1], 10_000))
    lengths = np.diff(cuts)
    assert lengths[0] == length
    assert lengths[-1] == max(64, length // 2 // 64 * 64)
    assert (lengths % GRAIN == 0).all()
    for place in (1, length - 1, length, length + 1, 1_800, 5_000):
        assert pieces.whole(place, 10_000) == max(cut for cut in cuts if cut <= place)
        assert pieces.end(place, 10_000) == min(cut for cut in cuts if cut > place)


def test_a_short_prompt_is_one_piece_of_which_nothing_is_reused():
    pieces = Pieces(128)
    assert [pieces.end(0, total) for total in (1, 256, 257)] == [1, 256, 128]
    assert [pieces.whole(200, total) for total in (201, 256, 257)] == [0, 0, 128]


def test_even_pieces_are_multiples_of_one_length():
    pieces = Pieces(100, even=True)
    assert [pieces.end(place, 9_950) for place in (0, 99, 100, 9_900)] == [100, 100, 200, 9_950]


def run(session, prompts, *, rows, **options) -> list[Recorded]:
    """All prompts through one scheduler with the pieces that a server has."""
    scheduler = Scheduler(Slots(session, rows), chunk=PIECE, **options)
    limit = session.manifest.model.context_length
    sequences = [Recorded(prompt, GREEDY, limit) for prompt in prompts]
    for sequence in sequences:
        scheduler.add(sequence)
    while scheduler.busy:
        for _, event in scheduler.step():
            if isinstance(event, Finished):
                assert event.reason == "length"
    return sequences


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precision": "int8"},
        {"precision": "int4", "block_size": 32, "prefill": True, "int8_kv_cache": True},
    ],
    ids=["fp32", "int8", "int4, graph for prompts, 8-bit cache"],
)
def test_long_prompts_give_the_same_bits_alone_in_company_and_from_what_is_kept(exporter, options):
    """In pieces of the length that is served: the interleavings have pieces of 8 tokens."""
    folder = exporter(**options, max_position_embeddings=1024, hidden_size=128, intermediate_size=256)
    session = open_session(folder, threads=2)
    rng = np.random.default_rng(0)
    common = rng.integers(0, session.manifest.model.vocab_size, 800).tolist()
    own = [rng.integers(0, session.manifest.model.vocab_size, 60).tolist() for _ in range(5)]
    prompts = [common[:kept] + more for kept, more in zip((700, 700, 650, 250, 800), own)]
    alone = [run(session, [prompt], rows=1)[0] for prompt in prompts]
    prefixes = PrefixCache(1 << 30, GRAIN)
    together = run(session, prompts, rows=3, prefixes=prefixes)
    assert prefixes.hits == 640 + 640 + 640 + 128
    first = run(session, prompts, rows=3, prefixes=PrefixCache(1 << 30, GRAIN), prompts_first=True)
    for found in (together, first):
        for here, there in zip(found, alone):
            assert here.token_ids == there.token_ids
            for ours, theirs in zip(here.logits, there.logits):
                assert np.array_equal(ours, theirs)


def test_the_last_token_of_a_prompt_goes_along_with_the_others_step():
    """It had a run of its own, in which every weight was read for one row."""
    session = FakeSession(lambda seen: 7, last_apart=True)
    scheduler = Scheduler(Slots(session, 2), chunk=PIECE)
    first, second = (Sequence(prompt, GREEDY, 64) for prompt in ([1, 2, 3], [4, 5, 6, 8]))
    scheduler.add(first)
    scheduler.add(second)
    while scheduler.busy:
        scheduler.step()
    # Both prompts are read before a step, since they are short; then both rows decode together.
    assert session.fed == [[1, 2], [4, 5, 6], [3], [8], [7], [7], [7], [7]]


def test_short_prompts_do_not_wait_for_a_step_each():
    """Four prompts of 20 tokens take no longer than one piece; an answer was stepped between each of them."""
    session = FakeSession(lambda seen: 7, last_apart=True)
    scheduler = Scheduler(Slots(session, 5), chunk=PIECE)
    endless = SamplingParams(do_sample=False, max_tokens=30, ignore_eos=True)
    answering = Sequence([1, 2], endless, 64)
    scheduler.add(answering)
    while len(answering.token_ids) < 2:
        scheduler.step()
    others = [Sequence([10 + number] * 20, endless, 64) for number in range(4)]
    for other in others:
        scheduler.add(other)
    before = len(answering.token_ids)
    while not all(other.token_ids for other in others):
        scheduler.step()
    assert len(answering.token_ids) - before <= 3


@pytest.mark.parametrize("last_apart", [False, True])
def test_a_batch_decodes_only_when_no_row_is_free(last_apart):
    """A step over few rows takes almost as long as one over many, so it waits for them."""
    session = FakeSession(lambda seen: 7, last_apart=last_apart)
    scheduler = Scheduler(Slots(session, 2), chunk=64, prompts_first=True)
    sequences = [Sequence([10 + n] * 200, GREEDY, 400) for n in range(3)]
    for sequence in sequences:
        scheduler.add(sequence)
    answering = []
    while scheduler.busy:
        scheduler.step()
        answering.append([len(sequence.token_ids) for sequence in sequences])
    assert all(len(sequence.token_ids) == 3 for sequence in sequences)
    begun = next(n for n, counts in enumerate(answering) if counts[1])
    assert answering[begun][0] <= 1, "the first answer went on while the second prompt was read"
    third = next(n for n, counts in enumerate(answering) if counts[2])
    assert answering[third][:2] == [3, 3], "two rows, so the third waits for an answer to end"


def test_a_cancelled_prompt_does_not_stop_a_batch():
    session = FakeSession(lambda seen: 7)
    scheduler = Scheduler(Slots(session, 2), chunk=64, prompts_first=True)
    going, gone = Sequence([1, 2], GREEDY, 400), Sequence([3] * 300, GREEDY, 400)
    scheduler.add(going)
    scheduler.add(gone)
    scheduler.step()
    gone.cancel()
    for _ in range(10):
        scheduler.step()
    assert not scheduler.busy
    assert len(going.token_ids) == 3
