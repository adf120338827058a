"""A Qwen2 checkpoint on disk: found, checked, and loaded by transformers.

With ``weightfiles`` (files and headers), ``modelconfig`` (config.json) and ``hub`` (downloads) this is
the only place that knows how checkpoints lie on disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qconvert.checkpoint.config import load_config, quiet_transformers, tensor_problems
from qconvert.checkpoint.files import (
    FileState,
    TensorInfo,
    inspect_files,
    read_json_object,
    read_weight_files,
    text_file_states,
)
from qconvert.checkpoint.hub import resolve_source
from qconvert.errors import QconvertError

if TYPE_CHECKING:
    from transformers import Qwen2Config, Qwen2ForCausalLM

__all__ = [
    "Checkpoint",
    "FileState",
    "TensorInfo",
    "checkpoint_name",
    "hash_files",
    "inspect_files",
    "load_model",
    "open_checkpoint",
    "resolve_source",
]

_READ_BYTES = 4 << 20


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint. ``tensors`` comes from the headers; no weight was read."""

    folder: Path
    config: Qwen2Config
    generation_config: dict[str, Any] | None
    weight_files: tuple[Path, ...]
    tensors: dict[str, TensorInfo]
    name: str


def open_checkpoint(folder: Path) -> Checkpoint:
    """Checks that the folder is a whole Qwen2 checkpoint that an export covers.

    A missing tokenizer is no error here (``inspect_files`` tells it): the graph does not need one.

    Raises:
        QconvertError: see ``load_config``; weights that are missing, truncated, garbage, Git LFS pointers,
            pickles or outside the folder; tensors that do not fit the config.
    """
    config = load_config(folder)
    weights = read_weight_files(folder)
    for state in (*text_file_states(folder), *weights.states):
        tokenizer_only = state.name == "tokenizer.json" and state.status == "missing"
        if state.harmful and not tokenizer_only:
            raise file_error(folder, state)
    if problems := tensor_problems(config, weights.tensors):
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise QconvertError(
            f"The weights do not fit the configuration: {problems[0]}{more}.",
            where=folder,
            hint="download the whole checkpoint again; adapters (LoRA) must be merged into the model first",
        )
    return Checkpoint(
        folder=folder,
        config=config,
        generation_config=read_json_object(folder / "generation_config.json")[1],
        weight_files=tuple(sorted({folder / info.file for info in weights.tensors.values()})),
        tensors=weights.tensors,
        name=checkpoint_name(folder),
    )


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


def load_model(checkpoint: Checkpoint) -> Qwen2ForCausalLM:
    """transformers' model in eval mode, in the checkpoint's dtype, its weights mapped from the files.

    Raises:
        QconvertError: a weight that transformers misses, does not expect or cannot fit, or a head that
            differs from the embedding although the config ties them.
    """
    from transformers import Qwen2ForCausalLM

    with quiet_transformers():
        model, info = Qwen2ForCausalLM.from_pretrained(
            checkpoint.folder,
            config=checkpoint.config,
            dtype="auto",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if names := sorted(map(str, info[kind])):
            what = f"transformers reports {kind.replace('_', ' ')}: {names[0]} ({len(names)} in all)."
            raise QconvertError(what, where=checkpoint.folder, hint="download the whole checkpoint again")
    if checkpoint.config.tie_word_embeddings and model.lm_head.weight is not model.model.embed_tokens.weight:
        raise QconvertError(
            "lm_head.weight differs from the embedding, although the config ties them.",
            where=checkpoint.folder / "config.json",
            hint="set tie_word_embeddings to false if the head was trained on its own",
        )
    return model.eval()


def hash_files(paths: Iterable[Path], progress: Callable[[int], None] | None = None) -> dict[str, str]:
    """SHA-256 in hexadecimal by file name; ``progress`` is called with the bytes read since the last call."""
    digests = {}
    for path in paths:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(_READ_BYTES):
                digest.update(block)
                if progress is not None:
                    progress(len(block))
        digests[path.name] = digest.hexdigest()
    return digests
