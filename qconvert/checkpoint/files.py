"""The files of a checkpoint folder, judged without loading a single weight.

A safetensors file says in its header what it holds, so a truncated download, a Git LFS pointer or a
missing shard shows after reading some kilobytes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from qconvert.checkpoint.file_state import (
    DOWNLOAD_HINT,
    MERGE,
    BrokenFileError,
    FileState,
    Status,
    refuse_pointer,
)
from qconvert.checkpoint.gguf.marker import parts_of
from qconvert.checkpoint.header import read_header
from qconvert.checkpoint.text_files import read_json_object, text_file_states

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_OTHER_VERSIONS = "index and shards come from different versions: download the whole checkpoint again"
_PICKLES = ("*.bin", "*.pt", "*.pth")


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor: safetensors' dtype name (``BF16``), shape, and file name."""

    dtype: str
    shape: tuple[int, ...]
    file: str


@dataclass(frozen=True)
class WeightFiles:
    """The weight files' states, every tensor named by the whole ones, and what is not read beside them."""

    states: tuple[FileState, ...]
    tensors: dict[str, TensorInfo]
    notes: tuple[str, ...] = ()


def inspect_files(folder: Path) -> list[FileState]:
    """The state of every file that an export reads, text files first. Raises nothing for a broken file."""
    return [*text_file_states(folder), *read_weight_files(folder).states]


def read_weight_files(folder: Path) -> WeightFiles:
    """Finds the safetensors files as transformers does (one file, else an index) and reads their headers.

    In the folder of a GGUF file (``gguf/folder.py``) it is that file's parts.
    """
    if (parts := parts_of(folder)) is not None:
        return _read_gguf(parts)
    if (folder / SINGLE_FILE).is_file():
        state, tensors = _read_shard(folder, SINGLE_FILE)
        others = sorted(path.name for path in folder.glob("model*.safetensors") if path.name != SINGLE_FILE)
        notes = [f"{SINGLE_FILE} is read, and {', '.join(others)} beside it not"] if others else []
        return WeightFiles((state,), tensors, tuple(notes))
    if (folder / INDEX_FILE).is_file():
        return _read_sharded(folder)
    return WeightFiles((_no_weights(folder),), {})


def _read_gguf(parts: list[Path]) -> WeightFiles:
    from qconvert.checkpoint.gguf.container import open_container
    from qconvert.checkpoint.gguf.metadata import ROPE_FACTORS
    from qconvert.checkpoint.gguf.tensors import checkpoint_name

    states, tensors = [], {}
    for path in parts:
        file = open_container(path)
        states.append(FileState(path.name, path.stat().st_size, "whole", f"{len(file.tensors)} tensors"))
        for name, found in file.tensors.items():
            if name != ROPE_FACTORS:
                tensors[checkpoint_name(name)] = TensorInfo(found.kind.name, found.shape, path.name)
    return WeightFiles(tuple(states), tensors)


def _read_sharded(folder: Path) -> WeightFiles:
    index_state, index = read_json_object(folder / INDEX_FILE)
    if index is None:
        return WeightFiles((index_state,), {})
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        detail = "no weight_map from tensor names to file names"
        return WeightFiles((_index_problem(index_state, "garbage", detail),), {})

    shards = [_read_shard(folder, name) for name in sorted(set(weight_map.values()))]
    tensors = {name: info for _, shard in shards for name, info in shard.items()}
    states = [index_state, *(state for state, _ in shards)]
    whole = {state.name for state, _ in shards if state.status == "whole"}

    # A refused shard is the cause of whatever the index seems to lack: report only that.
    refused = any(state.status == "refused" for state in states)
    if not refused and (conflict := _contradiction(folder, weight_map, tensors, whole)):
        states[0] = _index_problem(index_state, "garbage", *conflict)
    return WeightFiles(tuple(states), tensors)


def _contradiction(
    folder: Path, weight_map: dict[str, str], tensors: dict[str, TensorInfo], whole: set[str]
) -> tuple[str, str] | None:
    """Where the index and its whole shards disagree (a shard, or a tensor's place), and what to do."""
    for name, file in weight_map.items():
        if file in whole and (name not in tensors or tensors[name].file != file):
            return f"{name} is not in {file}, where the index puts it", _OTHER_VERSIONS
    for name in sorted(set(tensors) - set(weight_map)):
        return f"{name} of {tensors[name].file} is missing from the index", _OTHER_VERSIONS
    on_disk = {path.name for path in folder.glob("model-*-of-*.safetensors")}
    for name in sorted(on_disk - set(weight_map.values())):
        left = (
            f"if {name} was left behind by another version of the model, move it out of the folder; if not, "
            "download the whole checkpoint again"
        )
        return f"shard {name} is missing from the index", left
    return None


def _index_problem(state: FileState, status: Status, detail: str, hint: str = _OTHER_VERSIONS) -> FileState:
    return FileState(state.name, state.size, status, detail, hint)


def _read_shard(folder: Path, name: str) -> tuple[FileState, dict[str, TensorInfo]]:
    size = 0
    linked = ""
    try:
        path = _inside(folder, name)
        if path.is_symlink():
            linked = f", a link to {os.path.realpath(path)}"
        if not path.is_file():
            raise BrokenFileError("missing", "the index names this shard, but it is not on disk" + linked)
        size = path.stat().st_size
        refuse_pointer(path)
        tensors = {key: TensorInfo(*value, name) for key, value in read_header(path, size).items()}
    except BrokenFileError as broken:
        return FileState(name, size, broken.status, broken.detail, broken.hint), {}
    count = f"{len(tensors)} tensor{'' if len(tensors) == 1 else 's'}"
    return FileState(name, size, "whole", count + linked), tensors


def _inside(folder: Path, name: str) -> Path:
    hint = "do not use this checkpoint: its index reaches for other files of this machine"
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or pure.suffix != ".safetensors":
        raise BrokenFileError(
            "refused", "the index points outside the folder or to another kind of file", hint
        )
    try:
        (folder / name).lstat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass  # opening the file tells what is wrong
    except (OSError, ValueError) as error:
        raise BrokenFileError("refused", "the index has a name here that no file can have", hint) from error
    return folder / name  # a link to another folder, a hub's cache or another disk, is the user's own choice


def _variant(folder: Path) -> FileState | None:
    """Weights under another name than the one that transformers looks for by itself."""
    indexes = sorted(folder.glob("model.safetensors.index.*.json"))
    files = sorted(folder.glob("model.*.safetensors")) or sorted(folder.glob("*.safetensors"))
    found = [*indexes, *(path for path in files if "-of-" not in path.name)]
    if not found:
        return None
    wanted = INDEX_FILE if indexes else SINGLE_FILE
    names = ", ".join(path.name for path in found)
    detail = f"the folder has {names}, which nothing reads unless it is told to"
    hint = f"if {found[0].name} is what you want, call it so: ln -s {found[0].name} {folder / wanted}"
    return FileState(wanted, 0, "missing", detail, hint)


def _no_weights(folder: Path) -> FileState:
    if (single := folder / SINGLE_FILE).is_symlink():
        detail = f"a link to {single.readlink()}, and nothing is there"
        return FileState(SINGLE_FILE, 0, "missing", detail, "mount the disk, or correct the link")
    shards = sorted(folder.glob("model-*-of-*.safetensors"))
    if shards and not list(folder.glob("model.safetensors.index.*.json")):
        detail = f"there are shards ({shards[0].name}, ...) but no index that says what is in them"
        return FileState(INDEX_FILE, 0, "missing", detail, DOWNLOAD_HINT)
    if (adapter := folder / "adapter_model.safetensors").is_file():
        detail = "an adapter (LoRA), and the folder has no weights of the model itself"
        return FileState(adapter.name, adapter.stat().st_size, "refused", detail, MERGE)
    if variant := _variant(folder):
        return variant
    return _other_kind(folder) or FileState(
        SINGLE_FILE, 0, "missing", "no safetensors weights in the folder", "download the weights"
    )


def _other_kind(folder: Path) -> FileState | None:
    """Weights of a kind that is not read."""
    pickles = sorted(path for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        hint = (
            "where you trust the source, convert them once: in Python, transformers.AutoModelForCausalLM"
            f".from_pretrained({str(folder)!r}).save_pretrained(NEW_FOLDER), then copy the tokenizer's files"
        )
        detail = "only pickle weights, which can run code when loaded; qconvert reads safetensors only"
        return FileState(pickles[0].name, pickles[0].stat().st_size, "refused", detail, hint)
    if ggufs := sorted(folder.glob("*.gguf")):
        hint = f"give the file itself: {ggufs[0]}"
        detail = "a GGUF file has its own configuration and tokenizer, and is read alone"
        return FileState(ggufs[0].name, ggufs[0].stat().st_size, "refused", detail, hint)
    return None
