"""A checkpoint on disk: found, checked, and loaded by transformers.

With ``files`` and ``header`` (the weight files), ``config`` (config.json), ``assemble`` (the model) and
``hub`` (downloads) this is the only place that knows how checkpoints lie on disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qconvert.checkpoint.adapters.adapters import merge, read_adapter
from qconvert.checkpoint.adapters.merge import Merged
from qconvert.checkpoint.assemble import assemble
from qconvert.checkpoint.computed import Computed
from qconvert.checkpoint.config import load_config
from qconvert.checkpoint.file_state import FileState
from qconvert.checkpoint.files import TensorInfo, inspect_files, read_weight_files
from qconvert.checkpoint.fit import find_misfit
from qconvert.checkpoint.gguf.marker import parts_of, told_of_the_file
from qconvert.checkpoint.hub import resolve_source
from qconvert.checkpoint.quantised.scheme import find_quantised, find_scheme
from qconvert.checkpoint.quantised.tensors import TensorFiles
from qconvert.checkpoint.text_files import read_json_object, text_file_states
from qconvert.checkpoint.tokenizer import read_tokenizer
from qconvert.checkpoint.tokens import EndTokens, end_tokens
from qconvert.errors import QconvertError
from qconvert.formats.recipe import Kept
from qconvert.models.families import spec_of
from qconvert.models.recorder import expected_tensors
from qrun.sampling.params import SamplingParams, resolve, unsupported_settings

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from qconvert.checkpoint.gguf.tensors import GgufTensors

__all__ = [
    "Checkpoint",
    "FileState",
    "TensorInfo",
    "checkpoint_name",
    "inspect_files",
    "load_model",
    "open_checkpoint",
    "resolve_source",
]

# How tensors of a GGUF file are stored that are not quantised.
FLOATS = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint. ``tensors`` comes from the headers; no weight was read.

    ``computed`` are those of the model's tensors that no file holds as floats (``computed.py``). ``adapters``
    are facts of those that were merged, for the manifest, and ``merged_folders`` where they are, with their
    weights.
    """

    folder: Path
    config: PreTrainedConfig
    generation_config: dict[str, Any] | None
    weight_files: tuple[Path, ...]
    tensors: dict[str, TensorInfo]
    name: str
    ends: EndTokens
    sampling: SamplingParams
    notes: tuple[str, ...] = ()
    computed: Mapping[str, Computed] = field(default_factory=dict)
    adapters: tuple[dict[str, Any], ...] = ()
    merged_folders: tuple[tuple[Path, float], ...] = ()

    @property
    def held(self) -> dict[str, Kept]:
        """Matrices that it holds in codes which can be kept; none once adapters were merged into some."""
        if self.repacked is not None:
            return {}
        return {name: each.kept for name, each in self.computed.items() if each.kept is not None}

    @property
    def stored_as(self) -> dict[str, str]:
        """What the files hold in the place of each quantised tensor, for people."""
        return {
            name: each.stored_as
            for name, each in self.computed.items()
            if (not isinstance(each, Merged) or each.quantised is not None) and each.stored_as not in FLOATS
        }

    @property
    def repacked(self) -> str | None:
        """The precision of the codes into which adapters were merged, if there are any."""
        merged = (each.quantised for each in self.computed.values() if isinstance(each, Merged))
        bits = [each.kept.fmt.bits for each in merged if each is not None and each.kept is not None]
        return f"int{min(bits)}" if bits else None


def open_checkpoint(folder: Path) -> Checkpoint:
    """Checks that the folder is a whole checkpoint that an export covers.

    A missing tokenizer is no error here (``inspect_files`` reports it): the graph does not need one.

    Raises:
        QconvertError: see ``load_config``; weights that are missing, truncated, garbage, Git LFS pointers,
            pickles or outside the folder; tensors that do not fit the config.
    """
    with told_of_the_file(folder):
        return _open(folder)


def _open(folder: Path) -> Checkpoint:
    config = load_config(folder)
    weights = read_weight_files(folder)
    for state in (*text_file_states(folder), *weights.states):
        tokenizer_only = state.name == "tokenizer.json" and state.status == "missing"
        if state.harmful and not tokenizer_only:
            raise file_error(folder, state)
    tensors, quantised, gguf = weights.tensors, None, gguf_tensors(folder)
    if (scheme := find_scheme(folder)) is not None:
        quantised = find_quantised(folder, scheme, tensors, expected_tensors(spec_of(config)))
        tensors = quantised.tensors
    if misfit := find_misfit(config, tensors if quantised is None else quantised.all):
        more = f" (and {len(misfit.problems) - 1} more)" if len(misfit.problems) > 1 else ""
        raise QconvertError(
            f"The weights do not fit the configuration: {misfit.problems[0]}{more}.",
            where=folder,
            hint=misfit.hint,
        )
    generation = read_json_object(folder / "generation_config.json")[1]
    ends = end_tokens(folder, config, generation, config.vocab_size)
    return Checkpoint(
        folder=folder,
        config=config,
        generation_config=generation,
        weight_files=tuple(sorted({folder / info.file for info in weights.tensors.values()})),
        tensors=tensors,
        name=checkpoint_name(folder),
        ends=ends,
        sampling=resolve({}, generation)[0],
        notes=(
            *weights.notes,
            *(() if gguf is None else gguf.notes),
            *_notes(config, tensors, ends, generation),
            *_tokenizer_notes(folder, config.vocab_size),
        ),
        computed=quantised.computed if quantised is not None else {} if gguf is None else gguf.computed,
    )


def with_adapters(checkpoint: Checkpoint, names: Sequence[str]) -> Checkpoint:
    """The checkpoint with adapters merged into its weights, which is done while they are read.

    Args:
        checkpoint: the model on which they were trained.
        names: each FOLDER or FOLDER=WEIGHT.

    Raises:
        QconvertError: see ``read_adapter`` and ``merge``.
    """
    if not names:
        return checkpoint
    adapters = [read_adapter(name) for name in names]
    config = checkpoint.config
    files = TensorFiles(checkpoint.folder, checkpoint.tensors)
    expected = expected_tensors(spec_of(config))
    merged = merge(adapters, checkpoint.computed, files, expected, config.tie_word_embeddings)
    facts = tuple(adapter.facts() for adapter in adapters)
    notes = [
        f"adapter {fact['name']} (rank {fact['rank']}, weight {fact['weight']:g}) is merged" for fact in facts
    ]
    notes += [
        f"{adapter.folder.name} says that it was trained on {named}, and this is {checkpoint.name}"
        for adapter in adapters
        if (named := adapter.settings.trained_on) is not None
        and named.rstrip("/").rpartition("/")[2].lower() != checkpoint.name.lower()
    ]
    notes.append(f"adapters change {len(merged)} of the model's {len(expected)} tensors")
    found = replace(
        checkpoint,
        computed={**checkpoint.computed, **merged},
        adapters=facts,
        merged_folders=tuple((adapter.folder, adapter.weight) for adapter in adapters),
        name="-".join([checkpoint.name, "with", *(fact["name"] for fact in facts)]),
        notes=(*checkpoint.notes, *notes),
    )
    if found.repacked is None:
        return found
    told = "the model is quantised: its weights are dequantised, the adapters merged, and all packed again"
    return replace(found, notes=(*found.notes, told))


def gguf_tensors(folder: Path) -> GgufTensors | None:
    """The tensors of a GGUF file, where the folder is one's."""
    if (parts := parts_of(folder)) is None:
        return None
    from qconvert.checkpoint.gguf.tensors import read_tensors

    return read_tensors(parts, read_json_object(folder / "config.json")[1] or {})


def file_error(folder: Path, state: FileState) -> QconvertError:
    """What is wrong with one file, as the error that the user sees."""
    return QconvertError(f"{state.problem}.", where=folder / state.name, hint=state.hint or None)


def checkpoint_name(folder: Path) -> str:
    """The folder's name, or the repository's where the folder is a snapshot in the hub's cache."""
    folder = folder.resolve()
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.split("--")[-1]
    return folder.name


def load_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """transformers' model in eval mode, each tensor mapped from its file in the type that it has there.

    Raises:
        QconvertError: see ``assemble``.
    """
    return assemble(checkpoint.config, checkpoint.weight_files, checkpoint.folder, checkpoint.computed)


def _notes(
    config: PreTrainedConfig,
    tensors: dict[str, TensorInfo],
    ends: EndTokens,
    generation: dict[str, Any] | None,
) -> tuple[str, ...]:
    """What a user may not expect, and is told before the work."""
    notes = list(ends.notes)
    found = stored_dtypes(tensors)
    stated = None if config.dtype is None else str(config.dtype).removeprefix("torch.")
    if stated is not None and found != [stated] and not (stated == "float32" and "float64" not in found):
        notes.append(
            f"config.json says {stated} and the weight files hold {', '.join(found)}: "
            "what the files hold is exported, and is what the verification compares with"
        )
    if "float64" in found:
        notes.append("weights in float64 are rounded to float32, by less than one part in 16 million")
    for name, value in unsupported_settings(generation or {}).items():
        instead = "; max_new_tokens is obeyed" if name == "max_length" else ""
        notes.append(f"generation_config.json asks for {name}={value!r}, which qrun does not do{instead}")
    return tuple(notes)


def _tokenizer_notes(folder: Path, vocab_size: int) -> tuple[str, ...]:
    tokenizer = read_tokenizer(folder)
    highest = (
        -1 if tokenizer is None else max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    )
    if highest < vocab_size:
        return ()
    note = (
        f"the tokenizer has token ids up to {highest:,}, and the model only {vocab_size:,} tokens: "
        "it may be another model's"
    )
    return (note,)


def stored_dtypes(tensors: dict[str, TensorInfo]) -> list[str]:
    """The types of the tensors on disk, by PyTorch's names, those of most bytes first."""
    names = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    held = {info.dtype for info in tensors.values()}
    of_gguf = {info.dtype for info in tensors.values() if info.file.endswith(".gguf")} - names.keys()
    return [*sorted(of_gguf), *(name for dtype, name in names.items() if dtype in held)]
