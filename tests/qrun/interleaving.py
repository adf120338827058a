"""Sequences that come, go and are cancelled at any step, and what each of them would have got alone."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from qrun.backends.session import Session
from qrun.decoding.prefix_cache import PrefixCache
from qrun.decoding.scheduler import Scheduler
from qrun.decoding.sequence import Event, Failed, Finished, Prefilled, Scored, Scoring, Sequence, Token
from qrun.decoding.slots import Slots
from qrun.decoding.speculation import Speculation
from qrun.sampling.constraint import Constraint, Grammars, Vocabulary
from qrun.sampling.params import SamplingParams
from tests.fakes import tiny_tokenizer

# So that prompts of some tens of tokens have several pieces, and leave something to be reused.
CHUNK, GRAIN = 8, 4


def _vocabulary() -> Vocabulary:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = tiny_tokenizer(Path(folder))
    return Vocabulary(tokenizer.to_json(), 5_000, (258,))


GRAMMARS = Grammars(_vocabulary)


@dataclass(frozen=True)
class Request:
    """One sequence: what it asks, and the steps before which it is added and cancelled.

    Some want the log-probabilities of their prompt's tokens too.
    """

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    added: int
    cancelled: int | None = None
    regex: str | None = None
    scoring: Scoring | None = None

    def constraint(self) -> Constraint | None:
        """What the answer must fit, at its beginning."""
        return GRAMMARS.constraint(regex=self.regex)


class Recorded(Sequence):
    """A sequence that writes down the logits from which its tokens were chosen."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.logits: list[np.ndarray] = []

    def choose(self, logits: np.ndarray) -> list[Event]:
        self.logits.append(logits.copy())
        return super().choose(logits)


@dataclass
class Outcome:
    """What became of a sequence."""

    token_ids: list[int] = field(default_factory=list)
    scored: list[Token] = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)
    last: Finished | Failed | None = None


def run(
    session: Session,
    requests: list[Request],
    rows: int,
    *,
    prefixes: PrefixCache | None = None,
    speculation: Speculation | None = None,
) -> list[Outcome]:
    """Step them all to their ends over ``rows`` rows; checks on the way that events come in order."""
    slots = Slots(session, rows)
    scheduler = Scheduler(slots, chunk=CHUNK, grain=GRAIN, prefixes=prefixes, speculation=speculation)
    sequences = [
        Recorded(
            *(request.prompt_ids, request.params, session.manifest.model.context_length),
            *(request.constraint(), request.scoring),
        )
        for request in requests
    ]
    outcomes = {id(sequence): Outcome(logits=sequence.logits) for sequence in sequences}
    read: dict[int, int] = {}
    for step in range(10_000):
        for request, sequence in zip(requests, sequences):
            if request.added == step:
                scheduler.add(sequence)
            if request.cancelled == step:
                sequence.cancel()
        for sequence, event in scheduler.step():
            outcome = outcomes[id(sequence)]
            assert outcome.last is None, "an event after the last one"
            if isinstance(event, Token):
                assert read[id(sequence)] == len(sequence.prompt_ids), "a token before the prompt is read"
                outcome.token_ids.append(event.token_id)
            elif isinstance(event, Scored):
                outcome.scored += event.tokens
            elif isinstance(event, Prefilled):
                assert event.done > read.get(id(sequence), -1)
                read[id(sequence)] = event.done
            else:
                outcome.last = event
        assert slots.cache.lengths.tolist() == [len(held) for held in slots.token_ids]
        if not scheduler.busy and step > max(request.added for request in requests):
            break
    return [outcomes[id(sequence)] for sequence in sequences]


def differences(
    session: Session, requests: list[Request], rows: int, prefixes: PrefixCache | None = None
) -> Iterator[str]:
    """Where a sequence's answer, or one bit of its logits, is not what it gets alone."""
    for number, (request, found) in enumerate(zip(requests, run(session, requests, rows, prefixes=prefixes))):
        alone = run(session, [replace(request, added=0, cancelled=None)], 1)[0]
        assert isinstance(alone.last, Finished)
        if not isinstance(found.last, Finished):
            yield f"sequence {number} ended with {found.last}"
            continue
        count = len(found.token_ids)
        cut_off = found.last.reason == "cancelled" and request.cancelled is not None
        if not cut_off and (found.last.reason != alone.last.reason or count != len(alone.token_ids)):
            yield f"sequence {number} ended with {found.last}, alone with {alone.last}"
        if found.token_ids != alone.token_ids[:count]:
            yield f"sequence {number} got {found.token_ids}, alone {alone.token_ids}"
        if found.scored != alone.scored[: len(found.scored)] or (
            request.scoring is not None
            and not cut_off
            and [token.token_id for token in found.scored] != list(request.prompt_ids)
        ):
            yield f"sequence {number}: its prompt has {found.scored}, alone {alone.scored}"
        for place, (here, there) in enumerate(zip(found.logits, alone.logits)):
            if not np.array_equal(here, there):
                yield f"sequence {number}: logits {place} differ by {np.abs(here - there).max()}"
                break


def requests(
    vocab_size: int, *, longest_prompt: int = 40, most_tokens: int = 12, greedy: bool = False
) -> st.SearchStrategy[list[Request]]:
    """1 to 8 sequences; many prompts begin alike, so that rows are reused for what they hold already."""
    common = st.sampled_from([3, 5, 7]).map(lambda seed: tuple(_tokens(seed, longest_prompt, vocab_size)))
    own = st.integers(0, 1_000).map(lambda seed: tuple(_tokens(seed, longest_prompt, vocab_size)))
    prompt = st.builds(
        lambda shared, rest, kept, length: (shared[:kept] + rest)[:length],
        common,
        own,
        st.integers(0, longest_prompt),
        st.integers(1, longest_prompt),
    )
    sampled = st.builds(
        SamplingParams,
        do_sample=st.booleans(),
        temperature=st.sampled_from([0.3, 1.0, 3.0]),
        top_k=st.sampled_from([0, 1, 7]),
        top_p=st.sampled_from([0.7, 1.0]),
        repetition_penalty=st.sampled_from([1.0, 1.3]),
        presence_penalty=st.sampled_from([0.0, 0.5]),
        seed=st.integers(0, 3),
        max_tokens=st.integers(1, most_tokens),
        eos_token_ids=st.sampled_from([(), (1, 2, 3)]),
    )
    always = st.builds(
        SamplingParams,
        do_sample=st.just(False),
        max_tokens=st.integers(1, most_tokens),
        ignore_eos=st.just(True),
    )
    request = st.builds(
        Request,
        prompt_ids=prompt,
        params=always if greedy else sampled,
        added=st.integers(0, 12),
        cancelled=st.none() | st.integers(0, 30),
        # Most have no form; "ab*" may end at any time, "[a-f]{2}" ends by itself.
        regex=st.none()
        if greedy or find_spec("llguidance") is None
        else st.sampled_from([None, None, "(ab*|[c-z]+)", "[a-f]{2}", ".*"]),
        scoring=st.sampled_from([None, None, Scoring(2), Scoring(0, generate=False)]),
    )
    return st.lists(request, min_size=1, max_size=8)


def _tokens(seed: int, count: int, vocab_size: int) -> list[int]:
    found: list[int] = np.random.default_rng(seed).integers(0, vocab_size, count).tolist()
    return found
