"""What a completion asks of the engine: prompts and sampling parameters, one entry for each answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import UnionType
from typing import Any

from qrun.decoding.sequence import Scoring
from qrun.engine import Engine
from qrun.errors import QrunError
from qrun.sampling.constraint import Constraint
from qrun.sampling.params import SamplingParams
from qrun.serve.errors import ApiError, from_qrun
from qrun.serve.fields import ChatRequest, Common, CompletionRequest, texts_only
from qrun.serve.forms import constraint_of
from qrun.serve.thinking import of_effort
from qrun.serve.tools import Tools, check_variables, prompt_with_tools, read_tools

_MOST_ANSWERS = 16  # to one prompt
_MOST_PROMPTS = 128  # in one request
_MOST_BIASES = 4_096  # each is looked at in Python, whose lock all requests share
_DEFAULT_MAX_TOKENS = 16  # of /v1/completions, as in OpenAI's API


@dataclass(frozen=True)
class Asked:
    """A request, ready for the engine: one entry for each answer.

    Attributes:
        prompts: token ids; with n = 2 each stands twice.
        params: one for each.
        echoed: text that goes before each answer.
        constraints: what each answer must fit; for those without one, None.
        tools: those that may be called.
        scoring: what is wanted of the prompts themselves.
    """

    prompts: list[list[int]]
    params: list[SamplingParams]
    echoed: list[str]
    constraints: list[Constraint | None] = field(default_factory=list)
    tools: Tools | None = None
    scoring: Scoring | None = None

    def __post_init__(self) -> None:
        self.constraints.extend([None] * (len(self.prompts) - len(self.constraints)))


def ask_chat(engine: Engine, request: ChatRequest) -> Asked:
    """A chat: one prompt, n answers.

    Raises:
        ApiError: 400, with the field.
    """
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise ApiError(400, "give max_tokens or max_completion_tokens", param="max_tokens")
    tools = read_tools(request.tools, request.tool_choice, request.parallel_tool_calls)
    messages = texts_only(request.messages)
    check_variables(engine.model, request.variables)
    effort = of_effort(engine.model, request.reasoning_effort, "reasoning_effort")
    if request.variables.get("enable_thinking") and effort:
        raise ApiError(
            400, "reasoning_effort none and enable_thinking exclude each other", param="reasoning_effort"
        )
    prompt = prompt_with_tools(engine.model, messages, tools, {**request.variables, **effort})
    own = {
        "max_tokens": request.max_completion_tokens or request.max_tokens,
        "logprobs": (request.top_logprobs or 0) if request.logprobs else None,
    }
    if 0 in (request.max_completion_tokens, request.max_tokens):
        raise ApiError(400, "max_tokens must be a whole number from 1 up, not 0", param="max_tokens")
    return for_each(engine, request, [prompt], [""], own, tools=tools)


def ask_completion(engine: Engine, request: CompletionRequest) -> Asked:
    """Plain prompts: n answers for each.

    Raises:
        ApiError: 400, with the field.
    """
    if request.suffix:
        raise ApiError(400, "suffix is not supported here", param="suffix")
    if request.best_of not in (None, 1, request.n):
        raise ApiError(400, "best_of is not supported beyond n", param="best_of")
    tokenizer, given = engine.model.tokenizer, request.prompt
    several: Sequence[Any] = [given] if isinstance(given, str) or _all(given, int) else given
    if several and not _all(several, str | list):
        raise ApiError(400, "prompt: a list of token ids holds nothing else", param="prompt")
    # More than the queue can hold could never be answered.
    most = min(_MOST_PROMPTS, engine.capacity)
    if not 1 <= len(several) <= most:
        raise ApiError(400, f"prompt: give 1 to {most} of them, not {len(several)}", param="prompt")
    prompts = [
        tokenizer.encode(each, add_special_tokens=True) if isinstance(each, str) else list(each)
        for each in several
    ]
    vocab_size = engine.model.manifest.model.vocab_size
    for ids in prompts:
        bad = next((token_id for token_id in ids if not 0 <= token_id < vocab_size), None)
        if bad is not None:
            raise ApiError(400, f"token id {bad} is outside the vocabulary of {vocab_size}", param="prompt")
    echoed = [
        "" if not request.echo else each if isinstance(each, str) else tokenizer.decode(each, False)
        for each in several
    ]
    own: dict[str, Any] = {
        "max_tokens": request.max_tokens or _DEFAULT_MAX_TOKENS,
        "logprobs": request.logprobs,
    }
    scoring = Scoring(request.logprobs if request.echo else None, generate=request.max_tokens != 0)
    free = request.response_format is None and request.regex is None and request.grammar is None
    if scoring.count is not None and request.max_tokens == 1 and free:
        # Evaluation harnesses ask for one token and drop the last one of the lists. An end token would be
        # missing in them, and a token of the prompt be dropped instead.
        own["ignore_eos"] = True
    return replace(for_each(engine, request, prompts, echoed, own), scoring=scoring)


def _all(values: object, kind: type | UnionType) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(each, kind) for each in values)


def _is_token(text: str, size: int) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10 and int(text) < size


def check_stream_options(request: Common) -> None:
    """Refuse options of a stream where there is none."""
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options needs stream: true", param="stream_options")


def check_length(engine: Engine, prompt_ids: Sequence[int]) -> None:
    """Refuse a prompt that is longer than the context.

    Raises:
        ApiError: 400, with both numbers.
    """
    limit = engine.model.manifest.model.context_length
    if len(prompt_ids) > limit:
        text = f"the prompt has {len(prompt_ids):,} tokens, the model's context is {limit:,}"
        raise ApiError(400, text, param="messages", code="context_length_exceeded")


def for_each(
    engine: Engine,
    request: Common,
    prompts: list[list[int]],
    echoed: list[str],
    own: dict[str, Any],
    *,
    tools: Tools | None = None,
) -> Asked:
    """n answers for each prompt; ``own`` are sampling parameters that the API has other names for.

    Raises:
        ApiError: 400, with the field.
    """
    check_stream_options(request)
    count = 1 if request.n is None else request.n
    most = min(_MOST_ANSWERS, engine.capacity // len(prompts))
    if not 1 <= count <= most:
        raise ApiError(400, f"n must be 1 to {most}, not {count}", param="n")
    for ids in prompts:
        check_length(engine, ids)
    params = [_params(engine, request, own, number) for number in range(count)]
    constraint = constraint_of(engine, request)
    if tools is not None:
        if constraint is not None:
            text = "tools and a form of the answer exclude each other: give tool_choice none, or no form"
            raise ApiError(400, text, param="tools")
        constraint = tools.constraint(engine.model)
    answers = count * len(prompts)
    return Asked(
        [ids for ids in prompts for _ in range(count)],
        params * len(prompts),
        [text for text in echoed for _ in range(count)],
        [None if constraint is None else constraint.fresh() for _ in range(answers)],
        tools,
    )


def _params(engine: Engine, request: Common, own: dict[str, Any], number: int) -> SamplingParams:
    names = (
        *("temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
        *("presence_penalty", "frequency_penalty", "seed", "stop"),
    )
    sampling = {name: getattr(request, name) for name in names} | own
    if sampling["seed"] is not None:
        sampling["seed"] = abs(sampling["seed"]) + number  # so that the answers of one request differ
    if request.ignore_eos:
        sampling["ignore_eos"] = True
    if request.logit_bias is not None:
        if len(request.logit_bias) > _MOST_BIASES:
            text = f"logit_bias may name {_MOST_BIASES:,} tokens, not {len(request.logit_bias):,}"
            raise ApiError(400, text, param="logit_bias")
        size = engine.model.manifest.model.vocab_size
        bad = next((key for key in request.logit_bias if not _is_token(key, size)), None)
        if bad is not None:
            text = f"logit_bias: {bad!r} is not a token id of this model, which has {size:,}"
            raise ApiError(400, text, param="logit_bias")
        sampling["logit_bias"] = {int(key): bias for key, bias in request.logit_bias.items()}
    try:
        return engine.resolve(sampling)
    except QrunError as error:
        refusal = from_qrun(error)
        refusal.param = next((name for name in sampling if error.what.startswith(name)), None)
        raise refusal from None
