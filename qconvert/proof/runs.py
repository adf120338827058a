"""What runs: qrun's own answer, PyTorch's hidden states, and the paths of one case side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from qconvert.checkpoint.reference import Reference
from qconvert.proof.cases import Case, CaseSet
from qconvert.proof.compare import GreedyCheck, Rows, check_greedy, compare_rows, join, measure
from qconvert.proof.head_proof import HeadProof
from qconvert.proof.paths import PathReader
from qconvert.proof.report import Answer, PathResult
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
) -> tuple[list[Answer], str | None]:
    """What qrun itself generates, greedily; and why it stopped early, if it did.

    An answer ends with its end token, as a user gets it, and the next prompt is answered. A model has not
    learned what follows an end token that no turn follows, so there its logits show how rounding is enlarged,
    and not whether the export is right: on the sample a step after two such tokens had a KL divergence
    from 0.005 to 0.67, by the order of sums alone.
    """
    answers: list[Answer] = []
    left = cases.greedy_steps
    for prompt in cases.greedy_prompts:
        params = SamplingParams(do_sample=False, max_tokens=left, ignore_eos=True)
        tokens: list[int] = []
        try:
            for event in generate(Context(session), prompt, params):
                if isinstance(event, Token):
                    tokens.append(event.token_id)
                    advance(1)
                    if event.token_id in session.manifest.eos_token_ids:
                        break
        except QrunError as error:  # logits from which no token can be chosen
            return [*answers, Answer(prompt, tuple(tokens))], error.what
        answers.append(Answer(prompt, tuple(tokens)))
        left -= len(tokens)
        if left == 0:
            break
    return answers, None


def hidden_states(reference: Reference, cases: CaseSet, answers: Sequence[Answer]) -> list[torch.Tensor]:
    """Hidden states of every case, then of every greedy prompt with its answer.

    Short sequences share one batch: each layer's weights are then fetched twice and not once per case.
    """
    sequences = [
        *(case.token_ids for case in cases.cases),
        *((*answer.prompt, *answer.tokens[:-1]) for answer in answers),
    ]
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


def judge_answers(
    reference: Reference, hidden: Sequence[torch.Tensor], answers: Sequence[Answer]
) -> GreedyCheck:
    """The greedy answers, one after the other, against PyTorch's choice after the very same tokens."""
    import torch

    rows = []
    for answer, states in zip(answers, hidden, strict=True):
        first = len(answer.prompt) - 1
        rows.append(states[first : first + len(answer.tokens)])
    tokens = [token for answer in answers for token in answer.tokens]
    return check_greedy(tokens, reference.head(torch.cat(rows)))
