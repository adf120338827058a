"""What a caller may ask of the sampler: checked once, and resolved from request, model and defaults."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, SupportsFloat, SupportsIndex

from qrun.errors import QrunError

REQUEST = "request"
GENERATION_CONFIG = "generation_config.json"
MANIFEST = "qconvert.json"
DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen and when an answer ends. Every value is checked on construction.

    With ``do_sample=False`` the most likely token is taken, and temperature, top_k, top_p, min_p and
    seed have no effect. ``resolve`` turns sampling on for a user who names one of them.

    Attributes:
        do_sample: False takes the most likely token (greedy), True draws from the distribution.
        temperature: divides the logits; 0 is for greedy only.
        top_k: keep the k most likely tokens; 0 is off.
        top_p: keep the most likely tokens until their probabilities sum to this; 1 is off.
        min_p: drop tokens less likely than this share of the most likely one; 0 is off.
        repetition_penalty: above 1 makes tokens of the prompt and the answer less likely; 1 is off.
        presence_penalty: taken off the logit of every token the answer already holds, -2 to 2.
        frequency_penalty: the same, times the number of its occurrences in the answer, -2 to 2.
        seed: makes the draws repeatable; None takes one from the system.
        max_tokens: end of the answer in tokens; None means as far as the context goes.
        stop: strings that end the answer and are not part of it.
        eos_token_ids: tokens that end the answer and are not part of it.
        ignore_eos: go on past those tokens.
        logit_bias: (token id, -100 to 100) pairs, added to these tokens' logits before anything else; -100
            rules a token out, in practice. A mapping is taken as well.
        logprobs: report each token's log-probability, and those of so many likeliest ones, 0 to 20; None
            reports none. They are the model's own: before biases, penalties and temperature.

    Raises:
        QrunError: a value of the wrong type or out of range; names the field and the value.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name in FIELDS:
            object.__setattr__(self, name, check(name, getattr(self, name)))
        if self.do_sample and self.temperature == 0:
            raise QrunError(
                "temperature=0 cannot be sampled from (do_sample=True)",
                hint="set do_sample=False for the most likely token, or a temperature above 0",
            )


FIELDS = tuple(field.name for field in fields(SamplingParams))

# A request that names one of these asks for sampling.
SAMPLING_FIELDS: tuple[str, ...] = ("temperature", "top_k", "top_p", "min_p")

# transformers' name for each field that a generation_config.json can set.
GENERATION_CONFIG_NAMES = {
    "do_sample": "do_sample",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_tokens": "max_new_tokens",
    "stop": "stop_strings",
    "eos_token_ids": "eos_token_id",
}

# Settings of a generation_config.json that would change the answer and that qrun does not have,
# with the values that mean "off". Everything else there (pad_token_id, use_cache, ...) has no effect on qrun.
_UNSUPPORTED_UNLESS: dict[str, tuple[Any, ...]] = {
    "bad_words_ids": (None, []),
    "begin_suppress_tokens": (None, []),
    "diversity_penalty": (None, 0.0),
    "encoder_repetition_penalty": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "exponential_decay_length_penalty": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None, []),
    "guidance_scale": (None, 1.0),
    "max_length": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "no_repeat_ngram_size": (None, 0),
    "num_beams": (None, 1),
    "penalty_alpha": (None, 0.0),
    "sequence_bias": (None, []),
    "suppress_tokens": (None, []),
    "top_h": (None, 1.0),
    "typical_p": (None, 1.0),
}


def _boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _whole(value: object, low: int, high: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise TypeError  # True would pass as 1
    number = value.__index__()
    if number < low or (high is not None and number > high):
        raise ValueError
    return number


def _real(value: object, low: float, high: float = math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, SupportsFloat):
        raise TypeError
    number = float(value)
    if not low <= number <= high or math.isinf(number):  # a NaN fails every comparison
        raise ValueError
    return number


def _temperature(value: object) -> float:
    # Below 1e-6 the scaled logits leave float32's range, and the draw is greedy in all but name.
    return 0.0 if _real(value, 0.0) == 0 else _real(value, 1e-6)


def _strings(value: object) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, (list, tuple)) or not all(isinstance(text, str) and text for text in strings):
        raise TypeError
    return tuple(strings)


def _token_ids(value: object) -> tuple[int, ...]:
    ids = value if isinstance(value, (list, tuple)) else (value,)
    return tuple(dict.fromkeys(_whole(token_id, 0) for token_id in ids))


def _biases(value: object) -> tuple[tuple[int, float], ...]:
    pairs = value.items() if isinstance(value, Mapping) else value
    if not isinstance(pairs, Iterable) or isinstance(pairs, (str, bytes)):
        raise TypeError
    found = {_whole(token_id, 0, (1 << 31) - 1): _real(bias, -100.0, 100.0) for token_id, bias in pairs}
    return tuple(found.items())


_RULES: dict[str, tuple[Callable[[object], object], str]] = {
    "do_sample": (_boolean, "true or false"),
    "temperature": (_temperature, "0 (greedy) or a number from 1e-6 up"),
    "top_k": (lambda value: _whole(value, 0), "a whole number from 0 (off) up"),
    "top_p": (lambda value: _real(value, 0.0, 1.0), "a number from 0 to 1 (off)"),
    "min_p": (lambda value: _real(value, 0.0, 1.0), "a number from 0 (off) to 1"),
    "repetition_penalty": (lambda value: _real(value, 1e-6, 1e6), "a number from 1e-6 to 1e6 (1 is off)"),
    "presence_penalty": (lambda value: _real(value, -2.0, 2.0), "a number from -2 to 2 (0 is off)"),
    "frequency_penalty": (lambda value: _real(value, -2.0, 2.0), "a number from -2 to 2 (0 is off)"),
    "seed": (lambda value: None if value is None else _whole(value, 0), "a whole number from 0 up"),
    "max_tokens": (lambda value: None if value is None else _whole(value, 1), "a whole number from 1 up"),
    "stop": (_strings, "a list of non-empty strings"),
    "eos_token_ids": (_token_ids, "a list of token ids from 0 up"),
    "ignore_eos": (_boolean, "true or false"),
    "logit_bias": (_biases, "token ids with numbers from -100 to 100"),
    "logprobs": (
        lambda value: None if value is None else _whole(value, 0, 20),
        "a whole number from 0 to 20",
    ),
}


def check(name: str, value: object, *, where: str | None = None, shown_as: str | None = None) -> object:
    """The value of one field in its own type (``1`` becomes ``1.0`` for a temperature).

    Raises:
        QrunError: wrong type or out of range; names the field (as ``shown_as``) and the value.
    """
    normalise, expected = _RULES[name]
    try:
        return normalise(value)
    except (TypeError, ValueError, OverflowError):
        raise QrunError(f"{shown_as or name} must be {expected}, not {value!r}", where=where) from None


def resolve(
    request: Mapping[str, Any],
    generation_config: Mapping[str, Any] | None = None,
    *,
    eos_token_ids: Iterable[int] = (),
) -> tuple[SamplingParams, dict[str, str]]:
    """Settle every field: from the request, else the model's generation_config.json, else our default.

    A request that names temperature, top_k, top_p or min_p and not do_sample asks for sampling;
    temperature 0 asks for greedy. None in a request means "not given".

    Args:
        request: ``SamplingParams`` fields by name.
        generation_config: the model's generation_config.json, in transformers' names.
        eos_token_ids: the manifest's end tokens; those of generation_config.json are added to them,
            those of the request replace both.

    Returns:
        The parameters, and for each field where it came from: "request", "generation_config.json",
        "qconvert.json" (end tokens only) or "default".

    Raises:
        QrunError: an unknown key, a bad value, or a request that contradicts itself.
    """
    asked = {name: value for name, value in request.items() if value is not None}
    _refuse_unknown(asked)
    if generation_config is not None and not isinstance(generation_config, Mapping):
        raise QrunError("generation_config.json must hold a JSON object", where=GENERATION_CONFIG)
    model = generation_config or {}
    values: dict[str, Any] = {}
    sources = dict.fromkeys(FIELDS, DEFAULT)
    for name in FIELDS:
        model_name = GENERATION_CONFIG_NAMES.get(name)
        if name in asked:
            values[name], sources[name] = check(name, asked[name]), REQUEST
        elif model_name is not None and model.get(model_name) is not None:
            value = _off_elsewhere(name, model[model_name])
            found = check(name, value, where=GENERATION_CONFIG, shown_as=model_name)
            values[name], sources[name] = found, GENERATION_CONFIG

    manifest_eos = tuple(eos_token_ids)
    if manifest_eos and sources["eos_token_ids"] != REQUEST:
        from_model = values.get("eos_token_ids", ())
        values["eos_token_ids"] = check("eos_token_ids", (*manifest_eos, *from_model), where=MANIFEST)
        sources["eos_token_ids"] = f"{MANIFEST} + {GENERATION_CONFIG}" if from_model else MANIFEST

    wanted = {name: values[name] for name in SAMPLING_FIELDS if name in asked}
    _refuse_contradiction(values.get("do_sample") if "do_sample" in asked else None, wanted)
    if wanted and "do_sample" not in asked:
        values["do_sample"], sources["do_sample"] = values.get("temperature") != 0, REQUEST
    elif values.get("temperature") == 0 and "do_sample" not in asked:
        values["do_sample"], sources["do_sample"] = False, sources["temperature"]
    return SamplingParams(**values), sources


def _off_elsewhere(name: str, value: object) -> object:
    """A value of generation_config.json, with what other programs write for "off" in our own way."""
    if name == "top_k" and type(value) is int and value == -1:
        return 0
    if name == "eos_token_ids":
        ids = value if isinstance(value, list) else [value]
        return [token for token in ids if type(token) is not int or token >= 0]
    return value


def unsupported_settings(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """What a generation_config.json asks for and qrun does not do (num_beams=4, ...), for a warning."""
    return {
        name: generation_config[name]
        for name, off in _UNSUPPORTED_UNLESS.items()
        if name in generation_config and generation_config[name] not in off
    }


def _refuse_unknown(asked: Mapping[str, Any]) -> None:
    for name in asked:
        if name in FIELDS:
            continue
        by_their_name = [ours for ours, theirs in GENERATION_CONFIG_NAMES.items() if theirs == name]
        near = by_their_name or difflib.get_close_matches(str(name), FIELDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are: {', '.join(FIELDS)}"
        raise QrunError(f"unknown sampling parameter {name!r}", where=REQUEST, hint=hint)


def _refuse_contradiction(do_sample: bool | None, wanted: Mapping[str, Any]) -> None:
    off = {"temperature": (0.0, 1.0), "top_k": (0,), "top_p": (1.0,), "min_p": (0.0,)}
    active = [f"{name}={value}" for name, value in wanted.items() if value not in off[name]]
    if do_sample is False and active:
        raise QrunError(
            f"do_sample=False and {', '.join(active)} contradict each other",
            where=REQUEST,
            hint="leave do_sample out to sample, or leave the others out for the most likely token",
        )
