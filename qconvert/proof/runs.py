"""What runs: qrun's own answer, PyTorch's hidden states, and the paths of one case side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from qconvert.checkpoint.reference import Reference
from qconvert.proof.cases import Case, CaseSet
from qconvert.proof.compare import GreedyCheck, Rows, check_greedy, compare_rows, join, measure
from qconvert.proof.head_proof import HeadProof
from qconvert.proof.paths import PathReader
from qconvert.proof.report import PathResult
from qrun.backends.session import Session
from qrun.decoding.generate import Context, Token, generate
from qrun.errors import QrunError
from qrun.sampling.sampler import SamplingParams

if TYPE_CHECKING:
    import torch

# Positions compared at a time: with a vocabulary of 151,936 one array of logits is 58 MB.
PIECE = 96


def answer_greedily(
    session: Session, cases: CaseSet, advance: Callable[..., None]
) -> tuple[list[int], str | None]:
    """What qrun itself generates, greedily and past any end token; and why it stopped early, if it did."""
    params = SamplingParams(do_sample=False, max_tokens=cases.greedy_steps, ignore_eos=True)
    answer: list[int] = []
    try:
        for event in generate(Context(session), cases.greedy_prompt, params):
            if isinstance(event, Token):
                answer.append(event.token_id)
                advance(1)
    except QrunError as error:  # logits from which no token can be chosen
        return answer, error.what
    return answer, None


def hidden_states(reference: Reference, cases: CaseSet, answer: list[int]) -> list[torch.Tensor]:
    """Hidden states of every case, then of the greedy prompt with its answer.

    Short sequences share one batch: each layer's weights are then fetched twice and not once per case.
    """
    sequences = [*(case.token_ids for case in cases.cases), (*cases.greedy_prompt, *answer[:-1])]
    longest = max(range(len(sequences)), key=lambda index: len(sequences[index]))
    rest = [sequence for index, sequence in enumerate(sequences) if index != longest]
    states = reference.hidden_states(rest) if rest else []
    states.insert(longest, reference.hidden_states([sequences[longest]])[0])
    return states


def run_case(
    session: Session,
    case: Case,
    states: dict[str, tuple[Reference, torch.Tensor]],
    head: HeadProof,
    advance: Callable[..., None],
) -> list[PathResult]:
    """All paths of one case side by side, so that PyTorch's logits are computed once and held in pieces."""
    import torch

    readers = [PathReader(path, session, case.token_ids) for path in case.paths]
    found: dict[tuple[int, str], list[Rows]] = {}
    tokens = torch.tensor(case.token_ids)
    for start in range(0, len(tokens), PIECE):
        stop = min(start + PIECE, len(tokens))
        true = {}
        for name, (reference, hidden) in states.items():
            logits = head.logits(reference, hidden[start:stop])
            true[name] = (logits, torch.log_softmax(logits, -1))
        for index, reader in enumerate(readers):
            taken = reader.take(start, stop)
            if taken is None:
                continue
            first, ours = taken
            head.compare(ours)
            for name, (logits, log) in true.items():
                rows = compare_rows(
                    first, logits[first - start :], ours, tokens[first + 1 : stop + 1], log[first - start :]
                )
                found.setdefault((index, name), []).append(rows)
        advance(stop - start)
    results = []
    for index, reader in enumerate(readers):
        rows_by_reference = {name: join(found[index, name]) for name in states}
        measures = {name: measure(rows, text=case.text) for name, rows in rows_by_reference.items()}
        results.append(PathResult(case.name, reader.path.name, len(tokens), measures, rows_by_reference))
    return results


def judge_answer(
    reference: Reference, hidden: torch.Tensor, cases: CaseSet, answer: list[int]
) -> GreedyCheck:
    """The greedy answer against PyTorch's choice after the very same tokens."""
    first = len(cases.greedy_prompt) - 1
    return check_greedy(answer, reference.head(hidden[first : first + len(answer)]))
