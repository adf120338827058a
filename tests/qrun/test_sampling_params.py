"""If these fail, a user's setting is dropped in silence, or a bad one reaches the sampler."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qrun.errors import QrunError
from qrun.sampling.params import FIELDS, SamplingParams, resolve, unsupported_settings

QWEN = {  # Qwen2.5-1.5B-Instruct's generation_config.json
    "bos_token_id": 151643,
    "pad_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "repetition_penalty": 1.1,
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 20,
    "transformers_version": "4.37.0",
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(name, math.nan) for name in ("temperature", "top_p", "min_p", "repetition_penalty")],
        *[(name, math.inf) for name in ("temperature", "top_p", "repetition_penalty", "presence_penalty")],
        *[(name, True) for name in FIELDS if name not in ("do_sample", "ignore_eos")],
        *[(name, "0.5") for name in FIELDS if name not in ("stop",)],
        ("temperature", -0.1),
        ("temperature", 1e-9),
        ("temperature", 10**400),
        ("top_k", -1),
        ("top_k", 20.0),
        ("top_p", 1.01),
        ("top_p", -0.01),
        ("min_p", 1.5),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1.0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("seed", -1),
        ("seed", 1.0),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("stop", [""]),
        ("stop", ["a", 3]),
        ("stop", 3),
        ("eos_token_ids", [-1]),
        ("eos_token_ids", [1.0]),
        ("eos_token_ids", None),
        ("do_sample", 1),
        ("do_sample", None),
        ("ignore_eos", 0),
        ("logit_bias", {5: 101}),
        ("logit_bias", {-1: 1}),
        ("logit_bias", {"5": 1}),
        ("logit_bias", [5]),
        ("logprobs", 21),
        ("logprobs", -1),
    ],
)
def test_a_bad_value_names_itself_and_its_field(name, value):
    with pytest.raises(QrunError) as caught:
        SamplingParams(**{name: value})
    assert caught.value.what.startswith(f"{name} must be ")
    assert caught.value.what.endswith(f"not {value!r}")


def test_values_take_their_own_type():
    params = SamplingParams(
        temperature=1, top_k=np.int64(5), stop="END", eos_token_ids=7, top_p=np.float32(0.5)
    )
    assert (params.temperature, params.top_k, params.stop, params.eos_token_ids) == (1.0, 5, ("END",), (7,))
    assert [type(value) for value in (params.temperature, params.top_k, params.top_p)] == [float, int, float]


def test_temperature_0_cannot_be_sampled_from():
    with pytest.raises(QrunError, match="temperature=0"):
        SamplingParams(do_sample=True, temperature=0)
    assert SamplingParams(temperature=0).temperature == 0.0


def test_nothing_given_is_our_defaults():
    params, sources = resolve({}, None)
    assert params == SamplingParams()
    assert sources == dict.fromkeys(FIELDS, "default")


def test_the_model_s_own_settings():
    params, sources = resolve({}, QWEN)
    assert params == SamplingParams(
        do_sample=True,
        temperature=0.7,
        top_k=20,
        top_p=0.8,
        repetition_penalty=1.1,
        eos_token_ids=(151645, 151643),
    )
    assert sources["top_p"] == sources["eos_token_ids"] == "generation_config.json"
    assert sources["min_p"] == sources["max_tokens"] == "default"


def test_the_request_comes_first():
    params, sources = resolve(
        {"temperature": 0.2, "top_k": None, "max_tokens": 5}, {**QWEN, "max_new_tokens": 9}
    )
    assert (params.temperature, params.top_k, params.max_tokens) == (0.2, 20, 5)
    assert sources["temperature"] == sources["max_tokens"] == "request"
    assert sources["top_k"] == "generation_config.json"


def test_transformers_names_are_read():
    params, _ = resolve({}, {"max_new_tokens": 9, "stop_strings": ["x"], "min_p": 0.1, "eos_token_id": 3})
    assert (params.max_tokens, params.stop, params.min_p, params.eos_token_ids) == (9, ("x",), 0.1, (3,))


def test_a_null_in_the_file_is_as_good_as_nothing():
    params, sources = resolve({}, {"temperature": None, "top_k": None, "eos_token_id": None})
    assert params == SamplingParams()
    assert sources["top_k"] == "default"


def test_end_tokens_of_manifest_and_generation_config_both_count():
    params, sources = resolve({}, QWEN, eos_token_ids=[151643, 7])
    assert params.eos_token_ids == (151643, 7, 151645)
    assert sources["eos_token_ids"] == "qconvert.json + generation_config.json"
    params, sources = resolve({}, {}, eos_token_ids=[7])
    assert (params.eos_token_ids, sources["eos_token_ids"]) == ((7,), "qconvert.json")
    params, sources = resolve({"eos_token_ids": [1]}, QWEN, eos_token_ids=[7])
    assert (params.eos_token_ids, sources["eos_token_ids"]) == ((1,), "request")


@pytest.mark.parametrize("asked", [{"temperature": 0.5}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}])
def test_asking_for_a_sampling_field_turns_sampling_on(asked):
    params, sources = resolve(asked, {"do_sample": False})
    assert params.do_sample
    assert sources["do_sample"] == "request"


@pytest.mark.parametrize("asked", [{"seed": 3}, {"repetition_penalty": 1.2}, {"max_tokens": 4}])
def test_asking_for_another_field_does_not(asked):
    assert not resolve(asked, None)[0].do_sample


@pytest.mark.parametrize(
    "asked", [{"temperature": 0}, {"temperature": 0.0, "top_p": 0.9}, {"do_sample": False}]
)
def test_greedy_on_request(asked):
    params, sources = resolve(asked, QWEN)
    assert not params.do_sample
    assert sources["do_sample"] == "request"


def test_a_model_whose_temperature_is_0_is_greedy():
    params, sources = resolve({}, {"do_sample": True, "temperature": 0.0})
    assert not params.do_sample
    assert sources["do_sample"] == "generation_config.json"


@pytest.mark.parametrize(
    "asked",
    [
        {"do_sample": False, "temperature": 0.8},
        {"do_sample": False, "top_k": 4},
        {"do_sample": True, "temperature": 0},
    ],
)
def test_a_request_that_contradicts_itself_is_refused(asked):
    with pytest.raises(QrunError, match=r"contradict|temperature=0"):
        resolve(asked, None)


@pytest.mark.parametrize(
    ("key", "hint"), [("max_new_tokens", "max_tokens"), ("temprature", "temperature"), ("zzz", "known are")]
)
def test_an_unknown_key_is_refused_by_name(key, hint):
    with pytest.raises(QrunError, match=f"unknown sampling parameter '{key}'") as caught:
        resolve({key: 1}, None)
    assert hint in str(caught.value.hint)


def test_a_bad_value_in_the_file_names_the_file_and_its_own_name_for_it():
    with pytest.raises(QrunError, match=r"max_new_tokens must be .* not -3") as caught:
        resolve({}, {"max_new_tokens": -3})
    assert caught.value.where == "generation_config.json"
    with pytest.raises(QrunError, match="JSON object"):
        resolve({}, ["temperature"])


def test_a_bad_value_in_the_file_does_no_harm_where_the_request_replaces_it():
    assert resolve({"top_k": 5}, {"top_k": -3})[0].top_k == 5


def test_settings_that_qrun_lacks_are_reported():
    assert unsupported_settings(QWEN) == {}
    found = unsupported_settings(
        {"num_beams": 4, "typical_p": 1.0, "no_repeat_ngram_size": 3, "min_length": 0}
    )
    assert found == {"num_beams": 4, "no_repeat_ngram_size": 3}
