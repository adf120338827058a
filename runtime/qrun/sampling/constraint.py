"""Answers that fit a JSON schema, a regular expression or a grammar: which tokens may come next.

Over llguidance, which is imported at first use only; it is not needed for answers without a form.

Masks are made one row after the other: with Qwen's 151,936 tokens making one takes 10 to 170 µs and applying
it 130 µs, so the threads of llguidance's executor would gain nothing beside a step of several milliseconds.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qrun.errors import QrunError
from qrun.sampling.schemas import readable, refuse_unenforced, with_exact_formats

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

__all__ = ["Constraint", "Grammars", "Schema", "Vocabulary", "inline"]

Scores = NDArray[np.float32]
Schema = Mapping[str, Any] | bool

_KEPT = 16  # compiled forms, so that the same schema is not compiled for each request
# Limits to the cost of one form: beyond these, masks take tenths of a second and matchers tens of megabytes.
_LARGEST_SCHEMA = 128 << 10  # bytes of text
_LARGEST_GRAMMAR = 32 << 10
_LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 20_000,
    "max_items_in_row": 1_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}
_SCHEMA_OPTIONS = {
    # Unbounded, a small model writes blanks to the end of its context.
    "whitespace_pattern": r"[ \n\r\t]{1,20}",
    # A key written in escapes ("\u0061") would not be seen as the one that the schema names.
    "json_allowed_escapes": 'nrbtf\\"',
    "lenient": False,
    "coerce_one_of": False,
}


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a model.

    Attributes:
        tokenizer_json: the content of its tokenizer.json.
        size: above all ids of the tokenizer and of the logits, which are often more.
        end_ids: its end tokens.
    """

    tokenizer_json: str
    size: int
    end_ids: tuple[int, ...]


class ComplexFormError(QrunError):
    """The form of an answer costs more than a step may."""


class Constraint:
    """What an answer must fit, and the state of one answer: ``fresh`` makes another one for the next answer.

    Args:
        matcher: llguidance's, at its beginning.
        end_ids: the end tokens that it knows.
    """

    def __init__(self, matcher: LLMatcher, end_ids: NDArray[np.int64]) -> None:
        self._matcher = matcher
        self._end_ids = end_ids

    def fresh(self) -> Constraint:
        """The same constraint at its beginning, for another answer; no state is shared."""
        matcher = self._matcher.deep_copy()
        matcher.reset()
        return Constraint(matcher, self._end_ids)

    def mask(self, logits: Scores, end_ids: Iterable[int]) -> Scores:
        """A copy of the logits, with -Inf for the tokens that may not come next.

        Args:
            logits: ``[vocab]``, left as they are.
            end_ids: tokens that end this answer: allowed exactly where it is complete.

        Raises:
            QrunError: the form is too complex to go on.
        """
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        allowed = np.unpackbits(packed, bitorder="little").astype(bool)[: logits.size]
        complete = self._matcher.is_accepting()
        for token_id in (*self._end_ids.tolist(), *end_ids):
            if token_id < allowed.size:
                allowed[token_id] = False
        for token_id in end_ids:
            if token_id < allowed.size:
                allowed[token_id] = complete
        masked = np.full_like(logits, -np.inf, dtype=np.float32)
        np.copyto(masked[: allowed.size], logits[: allowed.size], where=allowed)
        return masked

    def accept(self, token_id: int) -> None:
        """A token was chosen.

        Raises:
            QrunError: the form is too complex to go on.
        """
        self._matcher.consume_token(token_id)
        self._check()

    @property
    def complete(self) -> bool:
        """Whether the answer may end here."""
        return bool(self._matcher.is_accepting())

    @property
    def over(self) -> bool:
        """Whether nothing but the end can come."""
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ComplexFormError(
                f"the answer's form is too complex to go on: {readable(self._matcher.get_error())}",
                hint="simplify the schema, the regular expression or the grammar",
            )


class Grammars:
    """Makes constraints for one model, and keeps the last ones compiled. Any thread may ask.

    Args:
        vocabulary: gives the model's tokens; asked once, when the first form is.
    """

    def __init__(self, vocabulary: Callable[[], Vocabulary]) -> None:
        self._vocabulary = vocabulary
        self._lock = Lock()
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[tuple[str, str], Constraint] = OrderedDict()

    def constraint(
        self, *, schema: Schema | None = None, regex: str | None = None, grammar: str | None = None
    ) -> Constraint | None:
        """What an answer must fit; None where nothing is asked. Takes milliseconds, seconds the first time.

        Args:
            schema: a JSON schema (draft 2020-12 where it names no other).
            regex: a regular expression that the whole answer matches, without look-around.
            grammar: a grammar in Lark's notation, in llguidance's variant.

        Raises:
            QrunError: more than one of them, llguidance is not installed, or one that cannot be enforced;
                says what of it.
        """
        given = {"schema": schema, "regex": regex, "grammar": grammar}
        asked = {kind: value for kind, value in given.items() if value is not None}
        if not asked:
            return None
        if len(asked) > 1:
            raise QrunError(f"{' and '.join(asked)} cannot both be asked", hint="give one of them")
        ((kind, value),) = asked.items()
        text = _text_of(kind, value)
        with self._lock:
            found = self._compiled.get((kind, text))
            if found is not None:
                self._compiled.move_to_end((kind, text))
        if found is None:
            found = self._compile(kind, text, value)
            with self._lock:
                self._compiled[kind, text] = found
                while len(self._compiled) > _KEPT:
                    self._compiled.popitem(last=False)
        return found.fresh()

    def _compile(self, kind: str, text: str, value: Any) -> Constraint:
        if find_spec("llguidance") is None:
            raise QrunError(
                f"a {kind} needs llguidance, which is not installed", hint="pip install 'qconvert[grammar]'"
            )
        from llguidance import LLMatcher, LLParserLimits

        if value is False:
            raise _refusal(kind, "no answer fits the schema false")
        if kind == "schema":
            try:
                exact = {} if value is True else with_exact_formats(value)
                source = LLMatcher.grammar_from_json_schema(
                    json.dumps(exact),
                    overrides=_SCHEMA_OPTIONS,  # type: ignore[arg-type]
                )
            except (ValueError, RecursionError) as error:
                raise _refusal(kind, str(error)) from None
            refuse_unenforced(value)
        elif kind == "regex":
            source = LLMatcher.grammar_from_regex(text)
        else:
            source = LLMatcher.grammar_from_lark(text)
        tokenizer = self._shared_tokenizer()
        matcher = LLMatcher(tokenizer, source, log_level=0, limits=LLParserLimits(**_LIMITS))
        if not matcher.is_error():
            matcher.compute_bitmask()  # the first mask costs most: a form beyond the limits is refused here
        if matcher.is_error():
            raise _refusal(kind, matcher.get_error())
        return Constraint(matcher, np.array(tokenizer.eos_tokens, dtype=np.int64))

    def _shared_tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        with self._lock:
            if self._tokenizer is None:
                given = self._vocabulary()
                self._tokenizer = LLTokenizer(
                    given.tokenizer_json, n_vocab=given.size, eos_token=list(given.end_ids) or None
                )
            return self._tokenizer


def inline(schema: Mapping[str, Any]) -> str:
    """A JSON schema as part of a grammar.

    Raises:
        QrunError: part of it cannot be enforced. More shows when the grammar is compiled.
    """
    refuse_unenforced(schema)
    options = {name: value for name, value in _SCHEMA_OPTIONS.items() if value is not False}
    try:
        return "%json " + json.dumps({"x-guidance": options, **with_exact_formats(schema)})
    except RecursionError:
        raise _refusal("schema", "it is nested too deeply") from None


def _text_of(kind: str, value: Any) -> str:
    """A form as text: the key under which it is kept, and the source of an expression or a grammar."""
    if kind == "schema":
        if not isinstance(value, Mapping | bool):
            raise QrunError(f"schema must be a JSON object, not {type(value).__name__}")
        try:
            text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise QrunError(f"schema is not JSON: {error}") from None
    else:
        if not isinstance(value, str):
            raise QrunError(f"{kind} must be a text, not {type(value).__name__}")
        text = value
    largest = _LARGEST_SCHEMA if kind == "schema" else _LARGEST_GRAMMAR
    if len(text) > largest:
        raise QrunError(f"{kind} has {len(text):,} characters, at most {largest:,} are taken")
    return text


def _refusal(kind: str, message: str) -> QrunError:
    return QrunError(f"{kind} cannot be enforced: {readable(message)}", hint=_HINTS[kind])


_HINTS = {
    "schema": "leave that out, or say it otherwise; docs/serving.md lists what is enforced",
    "regex": "the syntax is that of Rust's regex, without look-around",
    "grammar": "the notation is Lark's as llguidance reads it; it needs a rule named start",
}
