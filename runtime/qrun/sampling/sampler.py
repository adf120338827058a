"""From logits to a token: pure NumPy functions in transformers' order, and the state they need.

The order is that of transformers' ``GenerationMixin._get_logits_processor``: repetition penalty,
(presence and frequency penalty, which transformers does not have,) temperature, top-k, top-p, min-p.
Filters return the indices they keep instead of a masked vector, so that each works on what the one
before it has left: after top-k that is a handful of numbers and no longer a vocabulary of 151,936.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qrun.errors import QrunError
from qrun.sampling.params import SamplingParams, resolve

__all__ = [
    "Logprobs",
    "Sampler",
    "SamplingParams",
    "count_penalties",
    "distribution",
    "draw",
    "keep_min_p",
    "keep_top_k",
    "keep_top_p",
    "logprobs",
    "repetition_penalty",
    "resolve",
    "scale_by_temperature",
]

Scores = NDArray[np.float32]
Indices = NDArray[np.int64]

# Rows into which keep_top_k folds a vocabulary before it looks for the k-th largest.
_TOP_K_ROWS = 64


def repetition_penalty(logits: Scores, token_ids: Indices, penalty: float) -> Scores:
    """Divide the positive and multiply the negative logits of ``token_ids`` by ``penalty``.

    Source: Keskar et al. 2019, "CTRL" (arXiv:1909.05858), section 4.1, in transformers' form.

    Args:
        logits: ``[vocab]``, left as they are.
        token_ids: ids below ``vocab``; a repeated id counts once.
        penalty: above 0; 1 changes nothing.
    """
    penalised: Scores = logits.copy()
    seen = logits[token_ids]
    penalised[token_ids] = np.where(seen < 0, seen * penalty, seen / penalty)
    return penalised


def count_penalties(
    logits: Scores, token_ids: Indices, counts: NDArray[np.int64], *, presence: float, frequency: float
) -> Scores:
    """Take ``presence + count * frequency`` off the logit of each generated token.

    Only generated tokens count, not the prompt's, as in OpenAI's API ("Frequency and presence
    penalties", platform documentation) and in vLLM (``apply_penalties``).

    Args:
        logits: ``[vocab]``, left as they are.
        token_ids: the distinct generated ids, all below ``vocab``.
        counts: how often each was generated, same length.
        presence: per token. frequency: per occurrence.
    """
    penalised: Scores = logits.copy()
    penalised[token_ids] -= (presence + frequency * counts).astype(np.float32)
    return penalised


@dataclass(frozen=True, slots=True)
class Logprobs:
    """What a token's probability was among all tokens, as natural logarithms.

    Attributes:
        chosen: the token's own.
        likeliest: (token id, logarithm) of the likeliest tokens, the likeliest first.
    """

    chosen: float
    likeliest: tuple[tuple[int, float], ...]


def logprobs(logits: Scores, token_id: int, count: int) -> Logprobs:
    """The log-probabilities of one token and of the ``count`` likeliest under ``logits`` ``[vocab]``."""
    scores = logits.astype(np.float64)
    scores -= scores.max()
    scores -= math.log(np.exp(scores).sum())
    top = np.argpartition(scores, scores.size - count)[scores.size - count :] if count else np.empty(0, int)
    ranked = top[np.lexsort((top, -scores[top]))]
    return Logprobs(float(scores[token_id]), tuple((int(each), float(scores[each])) for each in ranked))


def scale_by_temperature(scores: Scores, temperature: float) -> Scores:
    """``scores / temperature`` less a constant: the peak becomes 0, so that nothing overflows."""
    # float32 knows nothing beyond 3e38, where all tokens have been equally likely for long.
    scaled: Scores = (scores - scores.max()) / np.float32(min(temperature, 1e30))
    return scaled


def keep_top_k(scores: Scores, k: int) -> Indices:
    """Ascending indices of the ``k`` highest scores, and of those that tie with the lowest of them.

    Source: Fan et al. 2018, "Hierarchical Neural Story Generation" (arXiv:1805.04833).
    """
    if k >= scores.size:
        return np.arange(scores.size)
    columns = scores.size // _TOP_K_ROWS
    if k > columns:
        return np.flatnonzero(scores >= _kth_largest(scores, k))
    # Each column's peak is one of the scores, so the k-th largest peak is at most the k-th largest
    # score. It rules out nearly all of a vocabulary in one pass, at a tenth of a partition's cost.
    peaks = scores[: columns * _TOP_K_ROWS].reshape(_TOP_K_ROWS, columns).max(axis=0)
    candidates = np.flatnonzero(scores >= _kth_largest(peaks, k))
    left = scores[candidates]
    return candidates[left >= _kth_largest(left, k)]


def _kth_largest(scores: Scores, k: int) -> np.float32:
    place = scores.size - k
    found: np.float32 = np.partition(scores, place)[place]
    return found


def keep_top_p(scores: Scores, p: float) -> Indices:
    """Ascending indices of the fewest tokens whose probabilities sum to ``p`` or more, and of ties.

    The tokens as likely as the last one kept are kept too, so that the choice does not hang on how
    equal numbers happen to be sorted. At least one token is kept.

    Source: Holtzman et al. 2019, "The Curious Case of Neural Text Degeneration" (arXiv:1904.09751).
    """
    ranked = np.sort(scores)[::-1]
    mass = np.cumsum(np.exp(ranked - ranked[0]).astype(np.float64))
    last = int(np.searchsorted(mass, p * mass[-1], side="left"))
    return np.flatnonzero(scores >= ranked[last])


def keep_min_p(scores: Scores, p: float) -> Indices:
    """Ascending indices of the tokens at least ``p`` times as likely as the most likely one.

    Source: Nguyen et al. 2024, "Turning Up the Heat: Min-p Sampling" (arXiv:2407.01082).
    """
    return np.flatnonzero(np.exp(scores - scores.max()) >= np.float32(p))


def distribution(logits: Scores, params: SamplingParams) -> tuple[Indices, NDArray[np.float64]]:
    """What sampling draws from: temperature, top-k, top-p and min-p, then softmax.

    Args:
        logits: ``[vocab]``, penalties applied; the highest must be finite.
        params: ``do_sample`` is not looked at.

    Returns:
        Token ids ``[n]``, ascending, and their probabilities ``[n]``, which sum to 1.
    """
    if params.top_k > 0:
        # Before the temperature, which divides all alike and so keeps the order: a few numbers are
        # left to be divided, and no second vector of the vocabulary's length is needed.
        ids = keep_top_k(logits, params.top_k)
        scores = scale_by_temperature(logits[ids], params.temperature)
    else:
        ids = np.arange(logits.size)
        scores = scale_by_temperature(logits, params.temperature)
    if params.top_p < 1:
        kept = keep_top_p(scores, params.top_p)
        ids, scores = ids[kept], scores[kept]
    if params.min_p > 0:
        kept = keep_min_p(scores, params.min_p)
        ids, scores = ids[kept], scores[kept]
    weights = np.exp(scores - scores.max()).astype(np.float64)
    return ids, weights / weights.sum()


def draw(ids: Indices, probabilities: NDArray[np.float64], uniform: float) -> int:
    """The token at ``uniform`` (0 <= uniform < 1) of the cumulative distribution."""
    cumulative = np.cumsum(probabilities)
    index = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    return int(ids[min(index, ids.size - 1)])


class Sampler:
    """Chooses the tokens of one answer, and remembers them for the penalties.

    Args:
        params: how to choose.
        prompt_ids: the prompt, which the repetition penalty counts too.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int] = ()) -> None:
        self.params = params
        self._generator = np.random.Generator(np.random.PCG64(params.seed))
        self._counting = params.presence_penalty != 0 or params.frequency_penalty != 0
        self._remembering = self._counting or params.repetition_penalty != 1
        self._prompt_ids = np.unique(np.asarray(prompt_ids if self._remembering else (), dtype=np.int64))
        self._generated: dict[int, int] = {}  # token id -> occurrences
        self._biased = np.array([token_id for token_id, _ in params.logit_bias], dtype=np.int64)
        self._biases = np.array([bias for _, bias in params.logit_bias], dtype=np.float32)

    def sample(self, logits: Scores) -> int:
        """Choose the next token and remember it.

        Args:
            logits: ``[vocab]``, left as they are.

        Raises:
            QrunError: the logits hold NaN or +Inf, or nothing but -Inf.
        """
        assert logits.ndim == 1, f"logits of one position expected, not of shape {logits.shape}"
        # argmax returns the first NaN if there is one, so this one look covers the whole vector.
        token_id = int(logits.argmax())
        _check_peak(float(logits[token_id]), token_id)
        if self._biased.size:
            logits = self._bias(logits)
        if self._remembering:
            logits = self._penalise(logits)
        if self._biased.size or self._remembering:
            token_id = int(logits.argmax())
        if self.params.do_sample:
            scores = logits.astype(np.float32, copy=False)
            token_id = draw(*distribution(scores, self.params), self._generator.random())
        self.accept(token_id)
        return token_id

    def accept(self, token_id: int) -> None:
        """Remember a token as generated, also one that was not sampled here."""
        if self._remembering:
            self._generated[token_id] = self._generated.get(token_id, 0) + 1

    def _bias(self, logits: Scores) -> Scores:
        inside = self._biased < logits.size
        biased: Scores = logits.copy()
        biased[self._biased[inside]] += self._biases[inside]
        return biased

    def _penalise(self, logits: Scores) -> Scores:
        size = len(self._generated)
        generated = np.fromiter(self._generated.keys(), dtype=np.int64, count=size)
        if self.params.repetition_penalty != 1:
            seen = np.concatenate((self._prompt_ids, generated))
            # A tokenizer may know more tokens than the model has logits for.
            logits = repetition_penalty(logits, seen[seen < logits.size], self.params.repetition_penalty)
        if self._counting:
            counts = np.fromiter(self._generated.values(), dtype=np.int64, count=size)
            inside = generated < logits.size
            logits = count_penalties(
                logits,
                generated[inside],
                counts[inside],
                presence=self.params.presence_penalty,
                frequency=self.params.frequency_penalty,
            )
        return logits


def _check_peak(peak: float, token_id: int) -> None:
    if math.isfinite(peak):
        return
    found = (
        "nothing but -Inf" if peak < 0 else f"{'NaN' if math.isnan(peak) else '+Inf'} at token id {token_id}"
    )
    raise QrunError(
        f"the model's logits hold {found}: no token can be chosen",
        hint="run qconvert verify on the folder; an fp16 model may overflow where fp32 or int8 does not",
    )
