"""What the verification reads: prose, Chinese and code of our own, in the folder's own tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import cycle, islice
from pathlib import Path

import numpy as np

from qconvert.checkpoint.tokenizer import read_tokenizer
from qconvert.proof import paths as ways
from qconvert.proof.paths import PromptPath, with_one_position, with_static_cache

GREEDY_STEPS = 128
_PROMPT_TOKENS = 32
# Above 512, so that an in-place cache has to grow twice on the way.
LONG_TOKENS = 576
# Longest static cache that is filled to its end: PyTorch reads as many tokens for it.
FULL_TOKENS = 4096
_SEED = 20240607


@dataclass(frozen=True)
class Case:
    """One prompt and the ways it takes.

    ``text`` is False for random tokens, whose perplexity means nothing.
    """

    name: str
    token_ids: tuple[int, ...]
    paths: tuple[PromptPath, ...]
    text: bool


@dataclass(frozen=True)
class CaseSet:
    """The cases of one model folder, and what is to be known about them.

    ``greedy_prompts`` are answered one after the other until ``greedy_steps`` tokens have been generated.
    """

    cases: tuple[Case, ...]
    greedy_prompts: tuple[tuple[int, ...], ...]
    greedy_steps: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Plan:
    name: str
    file: str
    tokens: int
    paths: tuple[PromptPath, ...]


# Not the full cross product: the long case takes the ways on which its length matters (positions,
# windows, a cache that has to grow), the others each add one, with both kinds of cache on each kind.
_PLANS = (
    _Plan("short", "short.txt", 32, (ways.WHOLE, ways.STEPPED, ways.TRIMMED_BACK_GROWING)),
    _Plan("long", "prose.txt", LONG_TOKENS, (ways.WHOLE, ways.CHUNKED, ways.STEPPED)),
    _Plan("chinese", "chinese.txt", 128, (ways.WHOLE, ways.STEPPED_GROWING, ways.TRIMMED_BACK)),
    _Plan("code", "code.txt", 160, (ways.WHOLE_GROWING, ways.CHUNKED_GROWING, ways.LAST)),
)


def make_cases(
    folder: Path,
    vocab_size: int,
    context_length: int,
    *,
    static_cache: bool = False,
    one_position: bool = False,
) -> CaseSet:
    """The cases in the tokens of ``tokenizer.json`` in ``folder``; seeded random tokens where there is none.

    Cases are cut to the context. What was cut or replaced stands in ``notes``. A static cache is also
    filled to its last slot. ``one_position`` (with a static cache) is for a plan, which computes logits for
    one position of a piece.
    """
    fit = with_one_position if one_position else with_static_cache
    encoded, text, notes = _encode(folder, vocab_size)
    cases = []
    for plan, tokens in zip(_PLANS, encoded):
        fitting = tokens[: min(plan.tokens, context_length)]
        if context_length < min(plan.tokens, len(tokens)):
            notes.append(f"{plan.name}: cut to the context of {context_length:,} tokens")
        if len(fitting) < 2:
            notes.append(f"{plan.name}: left out, it has {len(fitting)} tokens")
            continue
        ways_here = tuple(dict.fromkeys(map(fit, plan.paths))) if static_cache else plan.paths
        cases.append(Case(plan.name, fitting, ways_here, text))
    if static_cache and context_length <= FULL_TOKENS:
        repeated = tuple(islice(cycle(encoded[1]), context_length))
        cases.append(Case("full", repeated, (ways.FILLED,), text=False))
    elif static_cache:
        notes.append(f"full: left out, the cache holds {context_length:,} tokens, above {FULL_TOKENS:,}")
    prompts = _prompts(encoded, max(1, min(_PROMPT_TOKENS, context_length // 2)))
    steps = min(GREEDY_STEPS, context_length - len(prompts[0]))
    if steps < GREEDY_STEPS:
        notes.append(
            f"greedy: {steps} steps, the context of {context_length:,} tokens has no room for {GREEDY_STEPS}"
        )
    return CaseSet(tuple(cases), prompts, steps, tuple(notes))


def _prompts(encoded: Sequence[tuple[int, ...]], length: int) -> tuple[tuple[int, ...], ...]:
    """The short text, then pieces of the others in turn: one a step, since every answer may be empty."""
    first, *others = encoded
    starts = range(0, max(map(len, others)) - length + 1, length)
    pieces = (text[start : start + length] for start in starts for text in others)
    return (first[:length], *islice((piece for piece in pieces if len(piece) == length), GREEDY_STEPS - 1))


def _encode(folder: Path, vocab_size: int) -> tuple[list[tuple[int, ...]], bool, list[str]]:
    tokenizer = read_tokenizer(folder)
    if tokenizer is None:
        return _random(vocab_size), False, ["random tokens: the folder has no tokenizer.json"]
    encoded = [_tokens(tokenizer, plan.file) for plan in _PLANS]
    if not all(encoded) or max(map(max, encoded)) >= vocab_size:
        return _random(vocab_size), False, ["random tokens: the tokenizer is not of this model's vocabulary"]
    return encoded, True, []


def _tokens(tokenizer: object, name: str) -> tuple[int, ...]:
    text = (files("qconvert") / "data" / name).read_text(encoding="utf-8")
    ids: Sequence[int] = tokenizer.encode(text, add_special_tokens=False).ids  # type: ignore[attr-defined]
    return tuple(ids)


def _random(vocab_size: int) -> list[tuple[int, ...]]:
    generator = np.random.default_rng(_SEED)
    return [tuple(generator.integers(0, vocab_size, plan.tokens).tolist()) for plan in _PLANS]
