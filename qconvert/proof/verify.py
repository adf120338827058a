"""The proof that comes with an export: a model folder, run as a user runs it, against PyTorch.

Three questions, so that a fault cannot hide behind the noise of quantisation:

1. Are the stored weights the checkpoint's, within their format's rounding? Every tensor is read back, and
   every operator's attributes.
2. Does the graph compute what PyTorch computes with those stored weights? On every path, KV cache included;
   and its sharp twin, without the rounding of activations, to the last digits of float32.
3. How far is the whole from the checkpoint? Logits, KL, top-1 agreement, perplexity, a greedy answer.

For fp32 the second and third are one question. ``PROOFS`` is the list of what is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

from qconvert.checkpoint.load import Checkpoint
from qconvert.checkpoint.reference import Reference
from qconvert.errors import QconvertError
from qconvert.formats.record import read_record
from qconvert.formats.stored import VOCABULARY
from qconvert.progress import Progress
from qconvert.proof.adapter_check import check_adapters
from qconvert.proof.companion_proof import prove_companions
from qconvert.proof.evidence import Evidence
from qconvert.proof.graph_check import check_graphs
from qconvert.proof.inventory import check_inventory
from qconvert.proof.limits import PRECISIONS, limit_value, limits_name
from qconvert.proof.opening_proof import prove_opening
from qconvert.proof.prefill_proof import add_weights, prove_prompts
from qconvert.proof.report import Failure, GreedyResult, Report, greedy_failures, path_failures
from qconvert.proof.runs import judge_answers, run_case
from qconvert.proof.twin_proof import prove_prompt_twin, prove_rounding, prove_twin
from qconvert.proof.weight_check import MovedWeights, WeightCheck, check_weights
from qrun.backends.opening import open_session

__all__ = ["PROOFS", "Proof", "Report", "failures_one_by_one", "verify"]


@dataclass(frozen=True)
class Proof:
    """One thing that is asked of an export.

    Attributes:
        name: for people.
        applies: whether the folder has what this proof looks at.
        find: what is wrong; measures go into the evidence.
    """

    name: str
    applies: Callable[[Evidence], bool]
    find: Callable[[Evidence], list[Failure]]


def verify(path: Path, checkpoint: Checkpoint, reference: Reference, progress: Progress) -> Report:
    """Compare a model folder, or a plan in one, with the checkpoint it was made from; nothing is changed.

    Args:
        path: the folder, or a graph or plan in it.
        checkpoint: its files.
        reference: the same checkpoint, loaded.
        progress: for people.

    Raises:
        QconvertError: the reference is another model than the folder's.
        QrunError: the folder cannot be opened.
    """
    started = perf_counter()
    seen = _evidence(path, checkpoint, reference, progress)
    failed = [failure for proof in PROOFS if proof.applies(seen) for failure in proof.find(seen)]
    assert seen.greedy is not None
    return Report(
        name=seen.manifest.name,
        precision=seen.limits,
        device=seen.device,
        reference=reference.dtype,
        notes=(*seen.cases.notes, *seen.notes),
        weights=seen.weights,
        paths=tuple(seen.paths),
        greedy=seen.greedy,
        twins=tuple(seen.twins),
        failed=tuple(failed),
        seconds=perf_counter() - started,
    )


def failures_one_by_one(
    path: Path, checkpoint: Checkpoint, reference: Reference, progress: Progress
) -> Iterator[tuple[Proof, list[Failure]]]:
    """The same proofs, each with what it finds, as they are done: a caller may stop at the first failure."""
    seen = _evidence(path, checkpoint, reference, progress)
    for proof in PROOFS:
        if proof.applies(seen):
            yield proof, proof.find(seen)


def _evidence(path: Path, checkpoint: Checkpoint, reference: Reference, progress: Progress) -> Evidence:
    seen = Evidence(path, checkpoint, reference, progress)
    _check_fits(seen)
    return seen


def _check_fits(seen: Evidence) -> None:
    manifest = seen.manifest
    if manifest.precision not in PRECISIONS:
        raise QconvertError(
            f'there are no limits for the precision "{manifest.precision}"',
            where=manifest.folder,
            hint="update it: pip install -U qconvert",
        )
    config = seen.reference.model.config
    for key in (
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "hidden_size",
        "vocab_size",
    ):
        exported, found = getattr(manifest.model, key), getattr(config, key)
        if exported != found:
            raise QconvertError(
                f"the reference is another model: its {key} is {found:,}, the folder's is {exported:,}",
                where=manifest.folder,
                hint="give the checkpoint from which the folder was exported",
            )


# What the proofs find.


def _always(seen: Evidence) -> bool:
    return True


def _wrong_graphs(seen: Evidence) -> list[Failure]:
    return [Failure(fault.tensor, fault.what) for fault in check_graphs(seen.manifest, seen.spec)]


def _wrong_inventory(seen: Evidence) -> list[Failure]:
    return [Failure(fault.tensor, fault.what) for fault in check_inventory(seen.manifest, seen.spec)]


def _wrong_weights(seen: Evidence) -> list[Failure]:
    model, moved = seen.reference.model, _moved(seen)
    total = sum(parameter.numel() for parameter in model.parameters())
    with seen.progress.task("checking the weights", total) as advance:
        limit = limit_value("weight_steps", seen.limits)
        return _with_faults(
            seen, check_weights(seen.exported, model, limit, advance, moved, exact=seen.keeps_codes)
        )


def _moved(seen: Evidence) -> MovedWeights | None:
    """What a calibration has rounded and recorded, and how far it may have gone."""
    if seen.method is None:
        return None
    limit = limit_value("moved_steps", limits_name(seen.manifest.precision, method=seen.method))
    common = limit_value("common_steps", limits_name(seen.manifest.precision, method=seen.method))
    bits = 8 if seen.method == "compensated" else 4
    return MovedWeights(read_record(seen.manifest.folder), limit, common, bits)


def _wrong_adapters(seen: Evidence) -> list[Failure]:
    return [
        Failure(fault.tensor, fault.what) for fault in check_adapters(seen.checkpoint, seen.reference.model)
    ]


def _wrong_prompt_weights(seen: Evidence) -> list[Failure]:
    path = seen.manifest.prefill_path
    assert path is not None
    limit = limit_value("weight_steps", seen.limits)
    model, moved = seen.reference.model, _moved(seen)
    if moved is not None and seen.method != "compensated":
        # Of what a calibration has moved only the embedding is in both: the matrices of the second graph are
        # rounded to nearest, unless the first one has integer products too, and so the same matrices.
        shared = {name: each for name, each in moved.digests.items() if name in VOCABULARY}
        moved = replace(moved, digests=shared)
    return _with_faults(seen, add_weights(seen.weights, seen.prompts, path, model, limit, moved=moved))


def _other_scales(seen: Evidence) -> list[Failure]:
    path = seen.manifest.prefill_path
    assert path is not None
    return _with_faults(seen, seen.int8_kv.with_prompts(seen.weights, seen.prompts, path))


def _unrecorded_scales(seen: Evidence) -> list[Failure]:
    return _with_faults(seen, seen.int8_kv.with_record(seen.weights, read_record(seen.manifest.folder)))


def _wrong_scales(seen: Evidence) -> list[Failure]:
    _ = seen.hidden  # PyTorch's keys and values are watched meanwhile
    return _with_faults(seen, seen.int8_kv.with_faults(seen.weights, seen.limits))


def _missing_second_step(seen: Evidence) -> list[Failure]:
    return _with_faults(seen, seen.head.with_faults(seen.weights, seen.limits))


def _with_faults(seen: Evidence, check: WeightCheck) -> list[Failure]:
    """Take up an outcome that has the faults found so far, and some more."""
    new = check.faults[len(seen.weights.faults) :]
    seen.weights = check
    return [Failure(fault.tensor, fault.what) for fault in new]


def _wrong_paths(seen: Evidence) -> list[Failure]:
    cases = seen.cases.cases
    hidden = seen.hidden
    with seen.progress.task("comparing logits", sum(len(case.token_ids) for case in cases)) as advance:
        for index, case in enumerate(cases):
            states = {name: (seen.references[name], found[index]) for name, found in hidden.items()}
            seen.paths += run_case(seen.session, case, states, seen.head, advance)
    return path_failures(seen.limits, seen.paths)


def _wrong_answer(seen: Evidence) -> list[Failure]:
    answers, error = seen.answers
    first = len(seen.cases.cases)
    checks = {
        name: judge_answers(seen.references[name], found[first:], answers)
        for name, found in seen.hidden.items()
    }
    seen.greedy = GreedyResult(tuple(answers), error, checks)
    return greedy_failures(seen.limits, seen.greedy)


def _wrong_prompts(seen: Evidence) -> list[Failure]:
    seen.close_session()  # the second graph brings its own weights
    cases = seen.cases
    longest = max(len(case.token_ids) for case in cases.cases)
    with seen.progress.task("comparing the second graph", longest) as advance:
        both = open_session(seen.manifest.folder)
        found = prove_prompts(
            cases,
            seen.references,
            seen.prompts,
            seen.exported,
            lambda case, states: run_case(both, case, states, seen.head, advance),
        )
    before = len(path_failures(seen.limits, seen.paths))
    seen.paths += found
    return path_failures(seen.limits, seen.paths)[before:]


# In the order in which faults explain one another: a wrong attribute or weight, then what follows from it.
PROOFS = (
    Proof("operators and attributes", _always, _wrong_graphs),
    Proof("tables and constants", _always, _wrong_inventory),
    Proof("files beside the graph", _always, prove_companions),
    Proof("stored weights", _always, _wrong_weights),
    Proof(
        "stored weights of the graph for prompts", lambda seen: seen.has_prompt_graph, _wrong_prompt_weights
    ),
    Proof("scales of both graphs", lambda seen: seen.has_prompt_graph and seen.has_int8_cache, _other_scales),
    Proof("recorded scales of the KV cache", lambda seen: seen.has_int8_cache, _unrecorded_scales),
    Proof("sharp twin", lambda seen: not seen.of_plan, prove_twin),
    Proof("scales of the KV cache", lambda seen: seen.has_int8_cache, _wrong_scales),
    Proof("merged adapters", lambda seen: bool(seen.checkpoint.merged_folders), _wrong_adapters),
    Proof("logits on every path", _always, _wrong_paths),
    Proof("greedy answer", _always, _wrong_answer),
    Proof("rounding beside the sharp twin", lambda seen: seen.rounds and not seen.of_plan, prove_rounding),
    Proof("graph for prompts", lambda seen: seen.has_prompt_graph, _wrong_prompts),
    Proof("sharp twin of the graph for prompts", lambda seen: seen.has_prompt_graph, prove_prompt_twin),
    Proof(
        "second step of the logits", lambda seen: seen.exported.shortlist is not None, _missing_second_step
    ),
    Proof(
        "opening the folder",
        lambda seen: not seen.of_plan and (seen.manifest.folder / "tokenizer.json").is_file(),
        prove_opening,
    ),
)
