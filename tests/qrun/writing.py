"""Writes answers under a constraint as a model without any sense would: what may come next, at random."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
from jsonschema import ValidationError
from jsonschema.validators import extend, validator_for

from qrun.sampling.constraint import Constraint
from qrun.text.tokenizer import Tokenizer

_CLOSING, _BLANK = frozenset('"]}'), frozenset(" \n\t\r")


def write(
    constraint: Constraint, tokenizer: Tokenizer, end_id: int, seed: int, *, vocab_size: int, most: int = 400
) -> str | None:
    """A whole answer, or None where it found no end within ``most`` tokens. One byte is one token."""
    chance, written = random.Random(seed), []
    constraint = constraint.fresh()
    logits = np.zeros(vocab_size, np.float32)
    while len(written) < most:
        allowed = np.flatnonzero(np.isfinite(constraint.mask(logits, [end_id]))).tolist()
        assert allowed, f"nothing may come after {tokenizer.decode(written)!r}"
        if end_id in allowed and (len(allowed) == 1 or chance.random() < 0.4):
            return tokenizer.decode(written)
        allowed = [token for token in allowed if token != end_id]
        letters = {token: tokenizer.decode([token]) for token in allowed}
        solid = [token for token in allowed if letters[token] not in _BLANK]
        closing = [token for token in allowed if letters[token] in _CLOSING]
        if closing and chance.random() < (0.35 if len(written) < most / 3 else 0.97):
            allowed = closing
        elif solid and chance.random() < 0.95:
            allowed = solid
        token = chance.choice(allowed)
        constraint.accept(token)
        written.append(token)
        if constraint.over:
            return tokenizer.decode(written)
    return None


def takes(constraint: Constraint, token_ids: list[int], vocab_size: int) -> bool:
    """Whether an answer of these tokens is possible and complete."""
    constraint = constraint.fresh()
    logits = np.zeros(vocab_size, np.float32)
    for token in token_ids:
        if not np.isfinite(constraint.mask(logits, [])[token]):
            return False
        constraint.accept(token)
    return constraint.complete


def _multiple_of(validator: Any, step: Any, value: Any, schema: Any) -> Iterator[ValidationError]:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if number and Fraction(str(value)) % Fraction(str(step)):
        yield ValidationError(f"{value} is no multiple of {step}")


def faults(
    schema: Any, constraint: Constraint, tokenizer: Tokenizer, cases: list[dict[str, Any]], *, answers: int
) -> Iterator[str]:
    """What an enforced schema lets through and should not; "" for each completed answer that fits."""
    # jsonschema divides in floating point, where 0.58 is no multiple of 0.0001.
    kind = extend(validator_for(schema), {"multipleOf": _multiple_of})
    validator, end_id, vocab_size = kind(schema), 258, 320
    for case in cases:
        if not case["valid"]:
            text = json.dumps(case["data"], ensure_ascii=False)
            if takes(constraint, tokenizer.encode(text), vocab_size):
                yield f"takes {text}"
    for seed in range(answers):
        text = write(constraint, tokenizer, end_id, seed, vocab_size=vocab_size)
        if text is not None:
            yield "" if validator.is_valid(json.loads(text)) else f"wrote {text}"
