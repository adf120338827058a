"""If these fail, a batch of an int4 folder that was stopped ends with other answers than one that was not."""

from __future__ import annotations

import numpy as np
import pytest

from qrun.backends.opening import open_session
from qrun.decoding.slots import Slots
from tests.fakes import FakeSession, fake_manifest


@pytest.fixture(scope="module")
def long_blocks(exporter):
    """int4 in blocks of 128, as exports have it by default."""
    folder = exporter("int4", block_size=128, hidden_size=256, intermediate_size=512, num_hidden_layers=2)
    return open_session(folder, threads=2)


def logits_of(session, rows: int, place: int, *, even_steps: bool) -> np.ndarray:
    """Of three steps of one sequence, in a row amid others."""
    mine = np.random.default_rng(0).integers(0, 256, 30).tolist()
    others = np.random.default_rng(1).integers(0, 256, (9, 20)).tolist()
    slots = Slots(session, 9, even_steps=even_steps)
    for row in range(rows):
        slots.feed(row, mine if row == place else others[row], logits="none")
    return np.stack([slots.step([7 + step] * rows)[place].copy() for step in range(3)])


def test_a_row_has_the_same_bits_in_any_company(long_blocks):
    """A kernel takes two rows at once and an odd last one by itself, which adds in another order."""
    alone = logits_of(long_blocks, 1, 0, even_steps=True)
    for rows, place in ((2, 1), (3, 2), (4, 0), (5, 4), (7, 3), (8, 7), (9, 8)):
        assert (logits_of(long_blocks, rows, place, even_steps=True) == alone).all(), (rows, place)


def test_an_even_step_changes_nothing_in_the_row_beside():
    session = FakeSession(lambda seen: sum(seen) % 256, fake_manifest(context_length=64))
    plain, even = Slots(session, 3), Slots(session, 3, even_steps=True)
    assert len(plain) == len(even) == 3
    for slots in (plain, even):
        slots.feed(0, [1, 2, 3], logits="none")
        slots.feed(1, [4] * 64, logits="none")  # full: what is beside must have room for one more
        slots.trim(1, 64)
    assert (plain.step([5]) == even.step([5])).all()
    for slots in (plain, even):
        slots.trim(1, 0)
        slots.feed(1, [6, 7], logits="none")
        slots.feed(2, [8, 9], logits="none")
    # One row steps while the next one is being read, and then three with the spare row beside them.
    assert (plain.step([5]) == even.step([5])).all()
    assert plain.token_ids[:3] == even.token_ids[:3]
    assert plain.read == even.read[:3]
    assert (plain.step([1, 2, 3]) == even.step([1, 2, 3])).all()
    assert (plain.feed(1, [3, 4], logits="last") == even.feed(1, [3, 4], logits="last")).all()
