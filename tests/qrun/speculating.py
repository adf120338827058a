"""Several answers with guesses in each row, and what they must have in common with those without."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from qrun.backends.session import Session
from qrun.decoding.scheduler import Scheduler
from qrun.decoding.sequence import Finished
from qrun.decoding.sequence import Sequence as TokenSequence
from qrun.decoding.slots import Slots
from qrun.decoding.speculation import Speculation
from qrun.sampling.params import SamplingParams
from tests.qrun.interleaving import CHUNK, Outcome, Request, run


class Knowing(Speculation):
    """Knows each answer beforehand, and is wrong at some places; always tries as many as the step's row says.

    Args:
        answers: by prompt.
        wrong_at: each place of an answer that this divides is guessed wrongly.
    """

    def __init__(self, answers: dict[tuple[int, ...], list[int]], wrong_at: int = 5) -> None:
        super().__init__()
        self._answers, self._wrong_at, self._steps = answers, wrong_at, 0

    def guess(self, sequence: TokenSequence) -> list[int]:
        self._steps += 1
        return self._some(sequence, self._steps % 6)

    def guess_apart(self, sequences: Sequence[TokenSequence]) -> list[list[int]]:
        # None, one and several, in another row each time; and steps of all rows together now and then.
        self._steps += 1
        if self._steps % 4 == 0:
            return [[] for _ in sequences]
        return [self._some(each, (self._steps + 2 * row) % 6) for row, each in enumerate(sequences)]

    def _some(self, sequence: TokenSequence, count: int) -> list[int]:
        done = len(sequence.token_ids)
        known = self._answers[tuple(sequence.prompt_ids)]
        found = known[done : done + min(count, sequence.room - 1)]
        return [
            (each + 1) % 200 if (done + place) % self._wrong_at == 0 else each
            for place, each in enumerate(found)
        ]


@contextmanager
def eager(most: int = 4) -> Iterator[None]:
    """Guesses are tried whether they pay or not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qrun.decoding.speculation.worth", lambda share, available, costs: min(most, available))
        patch.setattr(
            "qrun.decoding.speculation.worth_apart",
            lambda rows, costs: [min(most, available) for _, available in rows],
        )
        yield


def known_answers(session: Session, requests: list[Request]) -> dict[tuple[int, ...], list[int]]:
    """What each request gets alone, by its prompt; where two have the same prompt, of one of them."""
    return {request.prompt_ids: run(session, [request], 1)[0].token_ids for request in requests}


def check_equal(
    session: Session, requests: list[Request], rows: int, speculation: Speculation
) -> list[Outcome]:
    """Each answer is the one without guesses, and so is its end; returns those with them.

    Raises:
        AssertionError: one is not.
    """
    plain = run(session, requests, rows)
    found = run(session, requests, rows, speculation=speculation)
    for number, (with_guesses, without) in enumerate(zip(found, plain)):
        assert isinstance(with_guesses.last, Finished), (number, with_guesses.last)
        assert isinstance(without.last, Finished)
        assert with_guesses.scored == without.scored or with_guesses.last.reason == "cancelled", number
        if requests[number].cancelled is not None:  # after another number of tokens
            count = min(len(with_guesses.token_ids), len(without.token_ids))
            assert with_guesses.token_ids[:count] == without.token_ids[:count], number
            continue
        assert with_guesses.token_ids == without.token_ids, number
        assert with_guesses.last.reason == without.last.reason, number
    return found


def together(
    session: Session, prompts: list[list[int]], params: SamplingParams, speculation: Speculation | None
) -> tuple[list[list[int]], Slots, int]:
    """The answers to prompts that decode at once, what their rows hold behind them, and the steps taken."""
    slots = Slots(session, len(prompts))
    scheduler = Scheduler(slots, chunk=CHUNK, grain=None, speculation=speculation, prompts_first=True)
    limit = session.manifest.model.context_length
    sequences = [TokenSequence(prompt, params, limit) for prompt in prompts]
    for sequence in sequences:
        scheduler.add(sequence)
    steps = 0
    while scheduler.busy:
        scheduler.step()
        steps += 1
        assert slots.cache.lengths.tolist() == [len(held) for held in slots.token_ids]
    return [sequence.token_ids for sequence in sequences], slots, steps
