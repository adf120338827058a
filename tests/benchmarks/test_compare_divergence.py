"""Quality figures against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.compare.divergence import compare


def test_the_reference_itself_has_no_divergence() -> None:
    logits = np.random.default_rng(0).normal(size=(70, 9)).astype(np.float32)
    found = compare(logits, logits, list(range(9)) * 7 + [0] * 7)
    assert found["mean_kl"] == pytest.approx(0, abs=1e-12)
    assert found["top1"] == 1.0
    assert found["perplexity"] == found["reference_perplexity"]


def test_two_tokens_by_hand() -> None:
    reference = np.log(np.array([[0.5, 0.5], [0.9, 0.1]], np.float32))
    other = np.log(np.array([[0.25, 0.75], [0.9, 0.1]], np.float32))
    found = compare(reference, other, [0, 1])
    expected = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    assert found["mean_kl"] == pytest.approx(expected / 2, rel=1e-5)
    assert found["perplexity"] == pytest.approx(1 / 0.75, rel=1e-5)
    assert found["reference_perplexity"] == pytest.approx(2.0, rel=1e-5)


def test_a_padded_vocabulary_does_not_count_and_missing_positions_do() -> None:
    reference = np.zeros((3, 4), np.float32)
    padded = np.concatenate([reference, np.full((3, 2), 50, np.float32)], axis=1)
    assert compare(reference, padded, [1, 2, 3])["mean_kl"] == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="2 positions"):
        compare(reference, reference[:2], [1, 2, 3])
    broken = reference.copy()
    broken[1, 1] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        compare(reference, broken, [1, 2, 3])
