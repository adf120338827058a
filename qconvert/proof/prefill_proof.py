"""The proof of a folder's second graph: its weights, and prompts that it reads and the first graph continues.

PyTorch answers with the same mixture: the prompt's positions through the second graph's weights, what
follows through the first graph's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qconvert.checkpoint.reference import PromptWeights, Reference
from qconvert.models.decoder import lower_prompt
from qconvert.proof.cases import CaseSet
from qconvert.proof.exported_weights import ExportedWeights
from qconvert.proof.paths import PROMPTED, prompt_length
from qconvert.proof.weight_check import MovedWeights, WeightCheck, check_weights

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from qconvert.proof.cases import Case
    from qconvert.proof.report import PathResult

    States = dict[str, tuple[Reference, torch.Tensor]]
    RunCase = Callable[[Case, States], list[PathResult]]


def prompt_weights(
    graph: Path, model: PreTrainedModel, recorded: Mapping[str, torch.Tensor] | None = None
) -> ExportedWeights:
    """The second graph's weights; ``recorded`` as in ``ExportedWeights``.

    Raises:
        QconvertError: a tensor of the checkpoint is not in the graph, or has another shape there.
    """
    return ExportedWeights(graph, model, lower_prompt, recorded)


def add_weights(
    check: WeightCheck,
    exported: ExportedWeights,
    graph: Path,
    model: PreTrainedModel,
    limit: float,
    *,
    moved: MovedWeights | None = None,
) -> WeightCheck:
    """The outcome of both graphs' weights; a fault of the second one's is named after its file.

    ``moved``: what a calibration has rounded of those that are in the second graph.
    """
    other = check_weights(exported, model, limit, moved=moved)
    worse = not other.worst_steps <= check.worst_steps
    return replace(
        check,
        tensors=check.tensors + other.tensors,
        values=check.values + other.values,
        worst_steps=other.worst_steps if worse else check.worst_steps,
        worst_tensor=other.worst_tensor if worse else check.worst_tensor,
        faults=(
            *check.faults,
            *(replace(fault, tensor=f"{graph.name}: {fault.tensor}") for fault in other.faults),
        ),
    )


def prove_prompts(
    cases: CaseSet,
    references: dict[str, Reference],
    prompt: ExportedWeights,
    own: ExportedWeights,
    run_case: RunCase,
) -> list[PathResult]:
    """The longest case, its beginning read by the second graph.

    Args:
        cases: of the folder; the longest one is taken.
        references: the checkpoint, and the first graph's own weights.
        prompt: the second graph's weights.
        own: the first graph's weights.
        run_case: compares a case's paths with given references.
    """
    case = max(cases.cases, key=lambda case: len(case.token_ids))
    case = replace(case, paths=(PROMPTED,))
    read = PromptWeights(prompt, prompt_length(len(case.token_ids)))
    mixed = Reference(references["checkpoint"].model, own, read, references["own weights"].kv)
    return run_case(
        case,
        {
            name: (reference, reference.hidden_states([case.token_ids])[0])
            for name, reference in {**references, "own weights": mixed}.items()
        },
    )
