"""If these fail, qrun draws from another distribution than transformers would."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from qrun.errors import QrunError
from qrun.sampling.sampler import (
    Sampler,
    SamplingParams,
    count_penalties,
    distribution,
    draw,
    keep_top_k,
    keep_top_p,
    logprobs,
)

VOCAB = 151_936

SETTINGS = [
    {},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05},
    {"temperature": 1.5, "top_p": 0.9, "repetition_penalty": 1.3},
    {"temperature": 0.3, "top_p": 0.99},
    {"top_p": 0.0},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"temperature": 2.0, "min_p": 0.1, "top_k": 50},
    {"temperature": 0.6, "top_p": 0.95, "top_k": 40, "min_p": 0.2, "repetition_penalty": 0.8},
    {"top_k": 1},
    {"top_k": 3_000},
    {"top_k": 10**9},
]


@pytest.fixture(scope="module")
def model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=None,
    )
    return Qwen2ForCausalLM(config).eval()


def random_logits(seed: int, size: int = VOCAB) -> np.ndarray:
    generator = np.random.default_rng(seed)
    # A few tokens stand out, as they do in a language model.
    logits = generator.standard_normal(size) * 2
    logits[generator.integers(0, size, 50)] += generator.uniform(2, 14, 50)
    return logits.astype(np.float32)


def by_transformers(model, logits: np.ndarray, prompt: list[int], settings: dict) -> np.ndarray:
    """Probabilities [vocab] after transformers' own processors, which it puts in its own order."""
    config = GenerationConfig(do_sample=True, **settings)
    processors = model._get_logits_processor(config, input_ids_seq_length=len(prompt))
    scores = processors(torch.tensor([prompt]), torch.from_numpy(logits)[None])
    return torch.softmax(scores[0].double(), dim=-1).numpy()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_draws_from_the_distribution_of_transformers(model, settings, seed):
    logits = random_logits(seed)
    prompt = np.random.default_rng(seed).integers(0, VOCAB, 400).tolist()
    expected = by_transformers(model, logits, prompt, settings)

    params = SamplingParams(do_sample=True, **settings)
    ids, probabilities = distribution(Sampler(params, prompt)._penalise(logits), params)
    actual = np.zeros(VOCAB)
    actual[ids] = probabilities
    # transformers sums top_p's mass in float32: a token on the very edge may fall to the other side.
    one_sided = np.flatnonzero((actual > 0) != (expected > 0))
    assert len(one_sided) <= 1
    assert np.abs(actual - expected).max() < 1e-5
    assert probabilities.sum() == pytest.approx(1.0)


def test_penalties_see_prompt_and_answer_as_in_generate(model):
    """A sampler that forgot the prompt, or its own tokens, leaves the path of ``generate``."""
    prompt = [5, 17, 17, 250, 3]
    settings = {"repetition_penalty": 1.4, "do_sample": False, "max_new_tokens": 40}
    output = model.generate(
        torch.tensor([prompt]), output_logits=True, return_dict_in_generate=True, pad_token_id=0, **settings
    )
    sampler = Sampler(SamplingParams(repetition_penalty=1.4), prompt)
    chosen = [sampler.sample(step[0].float().numpy()) for step in output.logits]
    assert chosen == output.sequences[0, len(prompt) :].tolist()
    greedy = [int(step[0].argmax()) for step in output.logits]
    assert chosen != greedy, "the penalty changed nothing, so this test shows nothing"


def test_presence_and_frequency_count_the_answer_and_not_the_prompt():
    logits = np.zeros(10, dtype=np.float32)
    sampler = Sampler(SamplingParams(presence_penalty=0.5, frequency_penalty=0.25), prompt_ids=[1, 2, 2])
    for token_id in (3, 4, 4, 4):
        sampler.accept(token_id)
    expected = np.zeros(10, dtype=np.float32)
    expected[3] = -0.5 - 0.25
    expected[4] = -0.5 - 3 * 0.25
    np.testing.assert_array_equal(sampler._penalise(logits), expected)


def test_sample_remembers_what_it_chose():
    """Frequency penalty 2 on a logit lead of 3: the leader wins twice, then the second has its turn."""
    logits = np.array([3.0, 0.0, -9.0], dtype=np.float32)
    sampler = Sampler(SamplingParams(frequency_penalty=2.0))
    assert [sampler.sample(logits) for _ in range(5)] == [0, 0, 1, 0, 1]


def test_count_penalties_leaves_its_input():
    logits = np.ones(4, dtype=np.float32)
    count_penalties(logits, np.array([1]), np.array([2]), presence=1.0, frequency=1.0)
    np.testing.assert_array_equal(logits, np.ones(4))


@pytest.mark.parametrize("params", [{}, {"repetition_penalty": 1.5}, {"do_sample": True, "temperature": 0.5}])
def test_the_session_s_buffer_is_never_written(params):
    logits = random_logits(0, 1000)
    before = logits.copy()
    Sampler(SamplingParams(**params), [1, 2, 3]).sample(logits)
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize("size", [1, 5, 64, 65, 1000, 10_007])
@pytest.mark.parametrize("k", [1, 2, 20, 157, 999])
def test_top_k_is_what_a_full_sort_would_keep(size, k):
    # Whole numbers, so that many tie with the k-th: transformers keeps them all.
    scores = np.random.default_rng(size + k).integers(-9, 9, size).astype(np.float32)
    kth = np.sort(scores)[::-1][min(k, size) - 1]
    np.testing.assert_array_equal(keep_top_k(scores, k), np.flatnonzero(scores >= kth))


def test_top_k_with_masked_tokens():
    scores = np.full(1000, -np.inf, dtype=np.float32)
    scores[[7, 900]] = 1.0, 2.0
    assert keep_top_k(scores, 1).tolist() == [900]
    assert keep_top_k(scores, 2).tolist() == [7, 900]


def test_top_p_keeps_the_token_that_crosses_the_line_and_no_more():
    scores = np.log(np.array([0.1, 0.5, 0.15, 0.25], dtype=np.float32))
    assert keep_top_p(scores, 0.49).tolist() == [1]
    assert keep_top_p(scores, 0.51).tolist() == [1, 3]
    assert keep_top_p(scores, 0.76).tolist() == [1, 2, 3]
    assert keep_top_p(scores, 0.0).tolist() == [1]


def test_a_seed_repeats_and_seeds_differ():
    logits = random_logits(3)

    def answer(seed: int) -> list[int]:
        sampler = Sampler(SamplingParams(do_sample=True, temperature=2.0, seed=seed))
        return [sampler.sample(logits) for _ in range(20)]

    assert answer(1) == answer(1)
    assert answer(1) != answer(2)


def test_draws_follow_the_probabilities():
    logits = np.log(np.array([0.5, 0.0, 0.3, 0.2], dtype=np.float32) + 1e-30)
    sampler = Sampler(SamplingParams(do_sample=True, seed=0))
    counts = Counter(sampler.sample(logits) for _ in range(20_000))
    assert counts[1] == 0
    # Five standard deviations of a binomial share at n = 20,000 are below 0.018.
    for token_id, probability in ((0, 0.5), (2, 0.3), (3, 0.2)):
        assert counts[token_id] / 20_000 == pytest.approx(probability, abs=0.018)


def test_draw_never_takes_an_impossible_token():
    ids, probabilities = np.array([4, 5, 6, 7]), np.array([0.0, 0.5, 0.5, 0.0])
    assert [draw(ids, probabilities, uniform) for uniform in (0.0, 0.49, 0.5, 0.999)] == [5, 5, 6, 6]


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize(
    ("place", "value", "named"), [(0, np.nan, "NaN"), (777, np.nan, "NaN"), (777, np.inf, r"\+Inf")]
)
def test_broken_logits_are_an_error_and_not_a_token(do_sample, place, value, named):
    logits = random_logits(1, 1000)
    logits[place] = value
    with pytest.raises(QrunError, match=f"{named} at token id {place}"):
        Sampler(SamplingParams(do_sample=do_sample)).sample(logits)


def test_logits_of_nothing_but_minus_infinity():
    with pytest.raises(QrunError, match="nothing but -Inf"):
        Sampler(SamplingParams()).sample(np.full(10, -np.inf, dtype=np.float32))


def test_a_tiny_temperature_is_greedy_and_does_not_overflow():
    logits = random_logits(2) * 100
    sampler = Sampler(SamplingParams(do_sample=True, temperature=1e-6))
    assert sampler.sample(logits) == int(logits.argmax())


def test_prompt_ids_beyond_the_model_s_logits_are_no_error():
    """A tokenizer's added tokens may lie beyond the head's rows; transformers ignores them too."""
    logits = random_logits(4, 100)
    settings = {"repetition_penalty": 1.2, "presence_penalty": 1.0}
    inside, beyond = (Sampler(SamplingParams(**settings), ids) for ids in ([3], [3, 100, 5000]))
    beyond.accept(100)
    np.testing.assert_array_equal(inside._penalise(logits), beyond._penalise(logits))


def test_a_bias_moves_tokens_and_those_beyond_the_vocabulary_are_no_matter():
    logits = np.array([1.0, 2.0, 3.0], dtype=np.float32)
    before = logits.copy()
    assert Sampler(SamplingParams(logit_bias={2: -100, 0: 2.5, 7: 100})).sample(logits) == 0
    np.testing.assert_array_equal(logits, before)


def test_log_probabilities_are_those_of_the_softmax_the_likeliest_first():
    logits = np.random.default_rng(0).normal(0, 3, 50).astype(np.float32)
    due = np.log(np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum())
    found = logprobs(logits, 7, 5)
    assert found.chosen == pytest.approx(due[7])
    assert [token_id for token_id, _ in found.likeliest] == np.argsort(-due)[:5].tolist()
    assert [value for _, value in found.likeliest] == pytest.approx(np.sort(due)[::-1][:5].tolist())
    assert logprobs(logits, 7, 0).likeliest == ()
    assert logprobs(np.array([5.0, -np.inf], dtype=np.float32), 0, 2).likeliest == ((0, 0.0), (1, -math.inf))
