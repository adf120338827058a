"""If these fail, long prompts take memory without bound, other logits, or the slower attention."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from qrun.backends.opening import open_session
from qrun.backends.ort import attention as ort_attention
from qrun.backends.ort.attention import most_tokens
from qrun.backends.ort.session import OrtSession
from qrun.errors import QrunError

SWITCH = "ORT_GQA_DISABLE_FLASH_ATTENTION"
TOKENS = np.random.default_rng(1).integers(0, 256, (1, 200), dtype=np.int64)


def test_scores_stay_within_bounds() -> None:
    assert most_tokens(512, 14) >= 512
    for total in (4_000, 8_000, 16_000):
        assert most_tokens(total, 14) * total * 14 * 4 <= 128 << 20
    assert most_tokens(1_000_000, 64) == 64
    assert most_tokens(0, 1) > 0


@pytest.mark.parametrize(("given", "expected"), [(None, "1"), ("0", "0")])
def test_the_switch_is_set_before_anything_runs_and_whoever_has_set_it_keeps_it(given, expected) -> None:
    """It was set and taken back at every opening, while other threads were running."""
    environment = {name: value for name, value in os.environ.items() if name != SWITCH}
    code = (
        "import os, sys, qrun.backends.opening, qrun.backends.ort.session\n"
        f"assert 'onnxruntime' not in sys.modules; print(os.environ['{SWITCH}'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | ({} if given is None else {SWITCH: given}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == expected, done.stderr


def test_opening_and_answering_leave_the_environment_alone(exporter) -> None:
    before = dict(os.environ)
    session = open_session(exporter(max_position_embeddings=1024), threads=2)
    session.forward(TOKENS, session.new_cache())
    assert dict(os.environ) == before


@pytest.mark.parametrize("int8_kv_cache", [False, True])
def test_both_ways_give_the_same_logits(exporter, monkeypatch, int8_kv_cache: bool) -> None:
    folder = exporter(max_position_embeddings=1024, int8_kv_cache=int8_kv_cache)
    found = []
    for flag in ("0", "1"):
        monkeypatch.setenv(SWITCH, flag)
        session = open_session(folder, threads=2)
        found.append(session.forward(TOKENS, session.new_cache(), "all").copy())
    np.testing.assert_allclose(found[0], found[1], atol=0.3 if int8_kv_cache else 2e-4)


def test_a_prompt_beyond_the_bound_goes_in_pieces(exporter, monkeypatch) -> None:
    session = open_session(exporter(max_position_embeddings=1024), threads=2)
    assert isinstance(session, OrtSession)
    whole = session.forward(TOKENS, session.new_cache()).copy()
    monkeypatch.setattr(ort_attention, "_MOST_SCORE_BYTES", 0)
    sizes = []
    read = OrtSession._read_piece

    def counted(self, token_ids, cache, logits):
        before = cache.length
        found = read(self, token_ids, cache, logits)
        sizes.append((before, cache.length))
        return found

    monkeypatch.setattr(OrtSession, "_read_piece", counted)
    cache = session.new_cache()
    np.testing.assert_allclose(session.forward(TOKENS, cache), whole, atol=2e-4)
    assert sizes == [(0, 64), (64, 128), (128, 192), (192, 200)]
    assert cache.length == 200


def test_the_bound_holds_for_the_rows_of_a_batch_together(exporter, monkeypatch) -> None:
    """It was asked for one row only: eight prompts at once took eight times the memory."""
    session = open_session(exporter(max_position_embeddings=1024), threads=2)
    assert isinstance(session, OrtSession)
    both = np.concatenate([TOKENS, TOKENS[:, ::-1]])
    whole = session.forward(both, session.new_cache(2)).copy()
    heads = session.manifest.model.num_attention_heads
    monkeypatch.setattr(ort_attention, "_MOST_SCORE_BYTES", 4 * heads * 200 * 200)  # one row's
    rows = []
    read = OrtSession._read_piece

    def counted(self, token_ids, cache, logits):
        rows.append(token_ids.shape)
        return read(self, token_ids, cache, logits)

    monkeypatch.setattr(OrtSession, "_read_piece", counted)
    np.testing.assert_allclose(session.forward(both, session.new_cache(2)), whole, atol=2e-4)
    assert rows == [(1, 200), (1, 200)]


def test_a_device_with_its_own_attention_is_given_the_prompt_whole(exporter, monkeypatch) -> None:
    """The bound is that of the CPU's kernel; it cut prompts on GPUs too."""
    session = open_session(exporter(max_position_embeddings=1024), threads=2)
    assert isinstance(session, OrtSession)
    monkeypatch.setattr(ort_attention, "_MOST_SCORE_BYTES", 0)
    assert session._most_tokens(200) == 64
    session.values.on_cpu = False
    assert session._most_tokens(200) is None


def test_a_prompt_beyond_the_context_is_refused_before_any_of_it_is_read(exporter, monkeypatch) -> None:
    session = open_session(exporter(max_position_embeddings=1024), threads=2)
    monkeypatch.setattr(ort_attention, "_MOST_SCORE_BYTES", 0)
    cache = session.new_cache()
    with pytest.raises(QrunError):
        session.forward(np.repeat(TOKENS, 6, 1), cache)
    assert cache.length == 0
