"""The proof that comes with an export: a model folder, run as a user runs it, against PyTorch.

Three questions, so that a fault cannot hide behind the noise of quantisation:

1. Are the stored weights the checkpoint's, within their format's rounding? Every tensor is read back.
2. Does the graph compute what PyTorch computes with those stored weights? On every path, KV cache included.
3. How far is the whole from the checkpoint? Logits, KL, top-1 agreement, perplexity, a greedy answer.

For fp32 the second and third are one question.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from qconvert.checkpoint.load import load_model, open_checkpoint, resolve_source
from qconvert.checkpoint.reference import Reference
from qconvert.errors import QconvertError
from qconvert.formats.record import read_record
from qconvert.progress import Progress
from qconvert.proof.cases import Case, CaseSet, make_cases
from qconvert.proof.compare import GreedyCheck, Rows, check_greedy, compare_rows, join, measure
from qconvert.proof.exported_weights import ExportedWeights
from qconvert.proof.head_proof import HeadProof
from qconvert.proof.kv_proof import KVProof
from qconvert.proof.limits import PRECISIONS, limit_value, limits_name
from qconvert.proof.paths import PathReader
from qconvert.proof.prefill_proof import add_weights, prompt_weights, prove_prompts
from qconvert.proof.report import (
    REPORT_JSON,
    REPORT_MARKDOWN,
    GreedyResult,
    PathResult,
    Report,
    find_failures,
)
from qconvert.proof.weight_check import MovedWeights, check_weights
from qrun.backends.opening import open_session
from qrun.backends.session import Session
from qrun.backends.trt.checks import why_not_here
from qrun.decoding.generate import Context, Token, generate
from qrun.errors import QrunError
from qrun.folder.manifest import MANIFEST_NAME, Manifest, names_plan, read_manifest, sha256_of
from qrun.folder.plan import read_plan
from qrun.sampling.sampler import SamplingParams

if TYPE_CHECKING:
    import torch

__all__ = ["Report", "verify", "verify_folder"]

# Positions compared at a time: with a vocabulary of 151,936 one array of logits is 58 MB.
PIECE = 96


def verify(path: Path, reference: Reference, progress: Progress) -> Report:
    """Compare a model folder, or a plan in one, with the checkpoint it was made from; nothing is changed.

    Raises:
        QconvertError: the reference is another model than the folder's.
        QrunError: the folder cannot be opened.
    """
    started = perf_counter()
    manifest = read_manifest(path)
    _check_fits(manifest, reference)
    limits = limits_name(manifest.precision, calibrated=_is_calibrated(manifest), kv_dtype=manifest.kv.dtype)
    session = open_session(path, prefill_graph=False)
    exported = ExportedWeights(manifest.graph_path, reference.model)
    kv = KVProof(exported, manifest.graph_path, reference) if manifest.kv.dtype == "int8" else None
    with progress.task(
        "checking the weights", sum(p.numel() for p in reference.model.parameters())
    ) as advance:
        limit = limit_value("weight_steps", limits)
        weights = check_weights(exported, reference.model, limit, advance, _moved_weights(manifest))
        if (prefill := manifest.prefill_path) is not None:
            prompts = prompt_weights(prefill, reference.model)
            weights = add_weights(weights, prompts, prefill, reference.model, limit)
            weights = kv.with_prompts(weights, prompts, prefill) if kv else weights

    facts, static = manifest.model, manifest.target == "tensorrt"
    cases = make_cases(
        manifest.folder,
        facts.vocab_size,
        facts.context_length,
        static_cache=static,
        one_position=names_plan(path),
    )
    with progress.task("answering greedily", cases.greedy_steps) as advance:
        answer, error = _answer(session, cases, advance)
    references = {"checkpoint": kv.checkpoint if kv else reference}
    if exported.rounded or kv:
        references["own weights"] = Reference(reference.model, exported, kv=kv.rounded if kv else None)
    hidden = {}
    for name, source in references.items():
        with progress.task(f"PyTorch, {name}"):
            hidden[name] = _hidden_states(source, cases, answer)
    weights = kv.with_faults(weights, limits) if kv else weights

    results: list[PathResult] = []
    head = HeadProof()
    with progress.task("comparing logits", sum(len(case.token_ids) for case in cases.cases)) as advance:
        for index, case in enumerate(cases.cases):
            states = {name: (references[name], found[index]) for name, found in hidden.items()}
            results += _run_case(session, case, states, head, advance)
    greedy = GreedyResult(
        tuple(cases.greedy_prompt),
        tuple(answer),
        error,
        {name: _judge_answer(references[name], found[-1], cases, answer) for name, found in hidden.items()},
    )
    device = session.device
    if prefill is not None:
        del session, hidden  # the second graph brings its own weights
        with progress.task(
            "comparing the second graph", max(len(case.token_ids) for case in cases.cases)
        ) as advance:
            both = open_session(manifest.folder)
            results += prove_prompts(
                cases,
                references,
                prompts,
                exported,
                lambda case, states: _run_case(both, case, states, head, advance),
            )
    weights = head.with_faults(weights, limits)
    return Report(
        name=manifest.name,
        precision=limits,
        device=device,
        reference=reference.dtype,
        notes=cases.notes,
        weights=weights,
        paths=tuple(results),
        greedy=greedy,
        failed=find_failures(limits, weights, tuple(results), greedy),
        seconds=perf_counter() - started,
    )


def verify_folder(path: Path, checkpoint: str, progress: Progress, *, record: bool = False) -> Report:
    """The same proof for a finished folder, whose files are hashed against the manifest first.

    Args:
        path: the model folder, or a .onnx file or plan inside it.
        checkpoint: a checkpoint's folder or a model id.
        record: write the report and its verdict into the folder; otherwise it is only read.

    Raises:
        QrunError: a file that is not the manifest's, a bad checkpoint or one of another model, or a plan
            that this machine cannot run.
    """
    manifest = read_manifest(path)
    if names_plan(path):
        _check_plan(path, manifest, record)
    else:
        path = manifest.folder
    with progress.task("hashing the files", sum(file.size for file in manifest.files)) as advance:
        manifest.check_files(hashes=True, progress=advance)
    source = open_checkpoint(resolve_source(checkpoint))
    with progress.task("loading the checkpoint"):
        model = load_model(source)
    report = verify(path, Reference(model), progress)
    if record:
        _record(manifest, report)
    return report


def _check_plan(path: Path, manifest: Manifest, record: bool) -> None:
    """What would end the verification of a plan, told before minutes of hashing and loading."""
    refusal = why_not_here(read_plan(path), manifest)
    if refusal is not None:
        raise refusal
    if record:
        raise QconvertError(
            "--write is for folders: the report in this one is about its ONNX graph, not about its plan",
            where=path,
            hint="leave --write out; --json prints the report of the plan",
        )


def _record(manifest: Manifest, report: Report) -> None:
    """Replace the folder's report, then its manifest, by one rename each."""
    report.write(manifest.folder)
    reports = (REPORT_JSON, REPORT_MARKDOWN)
    entries = [
        {"path": file.path, "size": file.size, "sha256": file.sha256}
        for file in manifest.files
        if file.path not in reports
    ]
    for name in reports:
        path = manifest.folder / name
        entries.append({"path": name, "size": path.stat().st_size, "sha256": sha256_of(path)})
    facts = {**manifest.raw, "verification": report.verdict(), "files": entries}
    written = manifest.folder / f".{MANIFEST_NAME}.new"
    written.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    written.replace(manifest.folder / MANIFEST_NAME)


def _is_calibrated(manifest: Manifest) -> bool:
    recipe = manifest.raw.get("recipe")
    return isinstance(recipe, dict) and recipe.get("calibration") is not None


def _moved_weights(manifest: Manifest) -> MovedWeights | None:
    """What is allowed to weights that a calibration has rounded, where it has."""
    if not _is_calibrated(manifest):
        return None
    limit = limit_value("moved_steps", limits_name(manifest.precision, calibrated=True))
    return MovedWeights(read_record(manifest.folder), limit)


def _check_fits(manifest: Manifest, reference: Reference) -> None:
    if manifest.precision not in PRECISIONS:
        raise QconvertError(
            f'there are no limits for the precision "{manifest.precision}"',
            where=manifest.folder,
            hint="update it: pip install -U qconvert",
        )
    config = reference.model.config
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


def _answer(session: Session, cases: CaseSet, advance: Callable[..., None]) -> tuple[list[int], str | None]:
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


def _hidden_states(reference: Reference, cases: CaseSet, answer: list[int]) -> list[torch.Tensor]:
    """Hidden states of every case, then of the greedy prompt with its answer.

    Short sequences share one batch: each layer's weights are then fetched twice and not once per case.
    """
    sequences = [*(case.token_ids for case in cases.cases), (*cases.greedy_prompt, *answer[:-1])]
    longest = max(range(len(sequences)), key=lambda index: len(sequences[index]))
    rest = [sequence for index, sequence in enumerate(sequences) if index != longest]
    states = reference.hidden_states(rest) if rest else []
    states.insert(longest, reference.hidden_states([sequences[longest]])[0])
    return states


def _run_case(
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


def _judge_answer(
    reference: Reference, hidden: torch.Tensor, cases: CaseSet, answer: list[int]
) -> GreedyCheck:
    first = len(cases.greedy_prompt) - 1
    return check_greedy(answer, reference.head(hidden[first : first + len(answer)]))
