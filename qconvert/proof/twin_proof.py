"""The sharp twins of an export's graphs against PyTorch with the stored weights, and the graphs against them.

Few positions are enough, for an operator that errs does so at every token. The twin reads two texts of
different lengths side by side, as a batch is read, and their last tokens one by one, so that its cache is
read as well, by either way of attention; a graph for prompts is followed by the graph that decodes. What is
left between a graph and its twin is rounding alone, and has its own limits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qconvert.checkpoint.reference import PromptWeights, Reference
from qconvert.errors import QconvertError
from qconvert.formats.stored import kv_scale_name
from qconvert.proof.compare import compare_rows
from qconvert.proof.evidence import Evidence
from qconvert.proof.limits import limit_value
from qconvert.proof.report import Failure, TwinResult
from qconvert.proof.twin import sharp_twin
from qconvert.proof.twin_session import TwinSession

if TYPE_CHECKING:
    import torch

    from qconvert.proof.exported_weights import ExportedWeights

# Tokens of the longer text that a twin reads, and of these those that it reads one by one, at the end.
TOKENS = 96
STEPS = 4
# What the first graph reads after a prompt that the second one has read, in pieces.
CONTINUED = 32
_PROMPT_PIECES = (40, 1)


def prove_twin(seen: Evidence) -> list[Failure]:
    """The twin of the graph that decodes."""
    try:
        return _prove_decoding(seen)
    except QconvertError as error:  # the graph has an operator whose exact counterpart is not known
        return [Failure(f"{seen.graph_path.name}, sharp twin", error.what)]


def prove_prompt_twin(seen: Evidence) -> list[Failure]:
    """The graph for prompts, followed by the graph that decodes: twins of both."""
    try:
        return _prove_prompt(seen)
    except QconvertError as error:  # as above
        return [Failure("prefill.onnx, sharp twin", error.what)]


def prove_rounding(seen: Evidence) -> list[Failure]:
    """What rounding costs the graph that decodes, compared with its twin, which has run before."""
    import torch

    if seen.twin_logits is None:
        return []  # there is no twin, which is a failure already
    tokens = _tokens(seen)
    graph = seen.session.forward(tokens[None], seen.session.new_cache(), "all")[0]
    nothing = torch.tensor([], dtype=torch.int64)
    rows = compare_rows(0, torch.from_numpy(seen.twin_logits), torch.from_numpy(graph), nothing)
    mean, largest = float(rows.kl.mean()), float(rows.kl.max())
    seen.twins[0] = replace(seen.twins[0], mean_rounding=mean, max_rounding=largest)
    where = f"{seen.graph_path.name}, sharp twin"
    measured = (
        (mean, limit_value("mean_rounding", seen.limits)),
        (largest, limit_value("max_rounding", seen.limits)),
    )
    return [
        Failure(where, f"rounding costs the graph a KL divergence of {value:.3g} ({most:g} at most)")
        for value, most in measured
        if not value <= most
    ]


def _prove_decoding(seen: Evidence) -> list[Failure]:
    tokens = _tokens(seen)
    # A graph for TensorRT has a cache of one length, and rows of one length.
    texts = [tokens] if seen.manifest.target == "tensorrt" else [tokens, tokens[len(tokens) // 3 :]]
    with seen.progress.task("the sharp twin", len(tokens)) as advance:
        logits = _read_side_by_side(_open(seen, seen.graph_path), texts)
        advance(len(tokens))
    seen.twin_logits = logits[0]
    return _judge(seen, seen.graph_path, Reference(seen.reference.model, seen.exported), texts, logits)


def _read_side_by_side(twin: TwinSession, texts: list[NDArray[np.int64]]) -> list[NDArray[np.float32]]:
    """Logits ``[tokens, vocab]`` of every text: most of it at once, the last tokens one by one."""
    steps = min(STEPS, *(len(text) - 1 for text in texts))
    cache, filled = twin.empty_cache(len(texts)), [0] * len(texts)
    pieces = [[text[: len(text) - steps] for text in texts]]
    pieces += [[text[len(text) - left :][:1] for text in texts] for left in range(steps, 0, -1)]
    rows: list[list[NDArray[np.float32]]] = [[] for _ in texts]
    for index, piece in enumerate(pieces):
        # Every second step goes by groups, so that either way reads what the other has written.
        by_groups = twin.has_groups and index % 2 == 1
        for row, found in zip(rows, twin.advance(piece, cache, filled, by_groups=by_groups)):
            row.append(found)
        filled = [before + len(new) for before, new in zip(filled, piece)]
    return [np.concatenate(row) for row in rows]


def _prove_prompt(seen: Evidence) -> list[Failure]:
    path = seen.manifest.prefill_path
    assert path is not None
    tokens = _tokens(seen)
    read = max(1, len(tokens) - min(CONTINUED, len(tokens) // 2))
    with seen.progress.task("the sharp twin of the graph for prompts", len(tokens)) as advance:
        cache = _read_prompt(seen, _open(seen, path), tokens[:read])
        rows = _open(seen, seen.graph_path).advance([tokens[read:]], cache, [read])
        advance(len(tokens))
    mixed = Reference(seen.reference.model, seen.exported, PromptWeights(seen.prompts, read))
    return _judge(seen, path, mixed, [tokens], rows)


def _read_prompt(
    seen: Evidence, twin: TwinSession, tokens: NDArray[np.int64]
) -> dict[str, NDArray[np.float32]]:
    """The cache of the graph that decodes, in float32, after a prompt in several pieces."""
    cache, start = twin.empty_cache(), 0
    for stop in sorted({*np.cumsum(_PROMPT_PIECES).tolist(), len(tokens)}):
        if stop > len(tokens):
            break
        found = twin.run([tokens[start:stop]], cache, [start])
        for name, before in cache.items():
            if f"present.{name}" in found:
                cache[name] = found[f"present.{name}"]
                continue
            _, heads, _, size = before.shape
            codes = found[f"new.{name}"].reshape(1, stop - start, heads, size).transpose(0, 2, 1, 3)
            cache[name] = np.concatenate([before, codes], axis=2)
        start = stop
    if not seen.has_int8_cache:
        return cache
    scaled = {}
    for name, codes in cache.items():
        layer, part = name.split(".")
        scaled[name] = codes * seen.exported.array(kv_scale_name(int(layer), part))
    return scaled


def _tokens(seen: Evidence) -> NDArray[np.int64]:
    """The beginning of the case that is nearest to as many tokens as a twin reads."""
    case = min(seen.cases.cases, key=lambda case: (abs(len(case.token_ids) - TOKENS), case.name))
    return np.asarray(case.token_ids[:TOKENS], dtype=np.int64)


def _open(seen: Evidence, path: Path) -> TwinSession:
    manifest = seen.manifest
    half = manifest.precision in ("fp16", "bf16") or manifest.target == "tensorrt"
    return TwinSession(sharp_twin(path, half=half), manifest.folder, manifest)


def _judge(
    seen: Evidence,
    path: Path,
    reference: Reference,
    texts: list[NDArray[np.int64]],
    twin: list[NDArray[np.float32]],
) -> list[Failure]:
    """Compare a twin's logits of the last positions of every text with PyTorch's."""
    import torch

    limit = limit_value("twin_difference", seen.limits)
    with _stored_angles(seen.exported, reference):
        states_of = reference.hidden_states([text.tolist() for text in texts])
    hidden = [states[-len(found) :] for states, found in zip(states_of, twin)]
    off = np.concatenate(
        [
            (found - _logits(reference, states, found, limit)).abs().amax(-1).numpy()
            for found, states in zip(map(torch.from_numpy, twin), hidden)
        ]
    )
    positions = np.concatenate(
        [np.arange(len(text) - len(found), len(text)) for text, found in zip(texts, twin)]
    )
    worst = int(np.nan_to_num(off, nan=np.inf).argmax())
    result = TwinResult(path.name, len(off), float(off[worst]), int(positions[worst]))
    seen.twins.append(result)
    if result.max_difference <= limit:
        return []
    begins = int(positions[~(off <= limit)].min())
    what = f"logits off by {result.max_difference:.3g} ({limit:g} at most are due to float32)"
    return [
        Failure(
            f"{path.name}, sharp twin",
            f"{what}, from position {begins} on: an error that rounding would hide",
        )
    ]


def _logits(reference: Reference, hidden: torch.Tensor, ours: torch.Tensor, limit: float) -> torch.Tensor:
    """PyTorch's logits, either of both steps where float32 cannot tell if a token is shortlisted."""
    import torch

    steps = reference.two_steps(hidden)
    if steps is None:
        return reference.head(hidden)
    coarse, exact = steps
    shortlist = reference.shortlist
    assert shortlist is not None
    logits = shortlist.apply(coarse, exact)
    ranges = coarse.view(len(coarse), shortlist.ranges, -1)
    ends = ranges.topk(shortlist.per_range).values[..., -1:]
    near = ((ranges - ends).abs() <= 2 * limit).view(coarse.shape)
    nearer = torch.where((ours - coarse).abs() < (ours - exact).abs(), coarse, exact)
    return torch.where(near, nearer, logits)


@contextmanager
def _stored_angles(exported: ExportedWeights, reference: Reference) -> Iterator[None]:
    """PyTorch rotates by the stored tables, which an export in float16 has rounded."""
    import torch

    tables = [
        torch.from_numpy(np.array(exported.array(name), dtype=np.float32))
        for name in ("cos_cache", "sin_cache")
    ]

    def look_up(module: Any, inputs: tuple[Any, ...], given: dict[str, Any], output: Any) -> Any:
        positions = inputs[1] if len(inputs) > 1 else given["position_ids"]
        return tuple(torch.cat([table[positions]] * 2, -1) for table in tables)

    handle = reference.model.model.rotary_emb.register_forward_hook(look_up, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
