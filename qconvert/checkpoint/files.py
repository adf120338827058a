"""The files of a checkpoint folder, judged without loading a single weight.

A safetensors file says in its header what it holds, so a truncated download, a Git LFS pointer or a
missing shard shows after reading some kilobytes.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from qconvert.checkpoint.header import DOWNLOAD_HINT, BrokenFileError, Status, read_header

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
POINTER_HINT = "run `git lfs install && git lfs pull` in the folder, or download the files again"

_STATUS_WORDS: dict[Status, str] = {
    "whole": "whole",
    "missing": "missing",
    "truncated": "truncated",
    "pointer": "a pointer",
    "garbage": "unusable",
    "refused": "refused",
}
_POINTER_START = b"version https://git-lfs.github.com/spec/"
_PICKLES = ("*.bin", "*.pt", "*.pth")


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor: safetensors' dtype name (``BF16``), shape, and file name."""

    dtype: str
    shape: tuple[int, ...]
    file: str


@dataclass(frozen=True)
class FileState:
    """One file of a checkpoint: ``size`` in bytes (0 where missing), what is wrong, what to do.

    ``required`` is false for files whose absence takes nothing from an export but convenience.
    """

    name: str
    size: int
    status: Status
    detail: str = ""
    hint: str = ""
    required: bool = True

    @property
    def harmful(self) -> bool:
        """Whether the checkpoint is not whole because of this file."""
        return self.status != "whole" and (self.required or self.status != "missing")

    @property
    def problem(self) -> str:
        """What is wrong with the file, in one sentence without a full stop."""
        return f"{self.name} is {_STATUS_WORDS[self.status]}: {self.detail}"


@dataclass(frozen=True)
class WeightFiles:
    """The weight files' states, and every tensor named by the whole ones."""

    states: tuple[FileState, ...]
    tensors: dict[str, TensorInfo]


def inspect_files(folder: Path) -> list[FileState]:
    """The state of every file that an export reads, text files first. Raises nothing for a broken file."""
    return [*text_file_states(folder), *read_weight_files(folder).states]


def text_file_states(folder: Path) -> list[FileState]:
    """The states of configuration, generation defaults, tokenizer and chat template."""
    tokenizer_config = read_json_object(folder / "tokenizer_config.json")[1] or {}
    template = "in tokenizer_config.json" if "chat_template" in tokenizer_config else "no chat template"
    return [
        text_file_state(folder, "config.json", absent="nothing says what this model is"),
        text_file_state(folder, "generation_config.json", required=False, absent="defaults apply"),
        text_file_state(folder, "tokenizer.json", absent="text cannot become token ids"),
        text_file_state(folder, "tokenizer_config.json", required=False, absent="no special-token names"),
        text_file_state(folder, "chat_template.jinja", required=False, absent=template),
    ]


def text_file_state(folder: Path, name: str, *, required: bool = True, absent: str = "") -> FileState:
    """The state of a JSON file (which must hold an object) or of a template (which must be UTF-8)."""
    path = folder / name
    if not path.is_file():
        return FileState(name, 0, "missing", absent, DOWNLOAD_HINT, required)
    size = path.stat().st_size
    try:
        _refuse_pointer(path)
        if size == 0:
            raise BrokenFileError("truncated", "the file is empty")
        if path.suffix == ".json":
            _parse_json_object(path)
        else:
            path.read_text(encoding="utf-8")
    except BrokenFileError as broken:
        return FileState(name, size, broken.status, broken.detail, broken.hint, required)
    except UnicodeDecodeError as error:
        return FileState(name, size, "garbage", f"not UTF-8 text: {error.reason}", DOWNLOAD_HINT, required)
    return FileState(name, size, "whole", required=required)


def read_json_object(path: Path) -> tuple[FileState, dict[str, Any] | None]:
    """A JSON file's state, and its content where the file is whole."""
    state = text_file_state(path.parent, path.name)
    return state, _parse_json_object(path) if state.status == "whole" else None


def read_weight_files(folder: Path) -> WeightFiles:
    """Finds the safetensors files as transformers does (one file, else an index) and reads their headers."""
    if (folder / SINGLE_FILE).is_file():
        state, tensors = _read_shard(folder, SINGLE_FILE)
        return WeightFiles((state,), tensors)
    if (folder / INDEX_FILE).is_file():
        return _read_sharded(folder)
    return WeightFiles((_no_weights(folder),), {})


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

    # A shard that is refused is worse than what the index lacks, so that shall be what the user reads.
    refused = any(state.status == "refused" for state in states)
    if not refused and (conflict := _contradiction(folder, weight_map, tensors, whole)):
        states[0] = _index_problem(index_state, "garbage", conflict)
    return WeightFiles(tuple(states), tensors)


def _contradiction(
    folder: Path, weight_map: dict[str, str], tensors: dict[str, TensorInfo], whole: set[str]
) -> str | None:
    """Where the index and its whole shards disagree: a shard, or a tensor's place."""
    on_disk = {path.name for path in folder.glob("model-*-of-*.safetensors")}
    for name in sorted(on_disk - set(weight_map.values())):
        return f"shard {name} is missing from the index"
    for name, file in weight_map.items():
        if file in whole and (name not in tensors or tensors[name].file != file):
            return f"{name} is not in {file}, where the index puts it"
    for name in sorted(set(tensors) - set(weight_map)):
        return f"{name} of {tensors[name].file} is missing from the index"
    return None


def _index_problem(state: FileState, status: Status, detail: str) -> FileState:
    hint = "index and shards come from different versions: download the whole checkpoint again"
    return FileState(state.name, state.size, status, detail, hint)


def _read_shard(folder: Path, name: str) -> tuple[FileState, dict[str, TensorInfo]]:
    size = 0
    linked = ""
    try:
        path = _inside(folder, name)
        if path.is_symlink():
            linked = f", a link to {path.resolve()}"
        if not path.is_file():
            raise BrokenFileError("missing", "the index names this shard, but it is not on disk" + linked)
        size = path.stat().st_size
        _refuse_pointer(path)
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
    return folder / name  # a link to another folder, a hub's cache or another disk, is the user's own choice


def _no_weights(folder: Path) -> FileState:
    if (single := folder / SINGLE_FILE).is_symlink():
        detail = f"a link to {single.readlink()}, and nothing is there"
        return FileState(SINGLE_FILE, 0, "missing", detail, "mount the disk, or correct the link")
    if shards := sorted(folder.glob("model-*-of-*.safetensors")):
        detail = f"there are shards ({shards[0].name}, ...) but no index that says what is in them"
        return FileState(INDEX_FILE, 0, "missing", detail, DOWNLOAD_HINT)
    pickles = sorted(path for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        hint = (
            "where you trust the source, convert them once: in Python, "
            f"transformers.Qwen2ForCausalLM.from_pretrained({str(folder)!r}).save_pretrained(NEW_FOLDER), "
            "then copy the tokenizer's files"
        )
        detail = "only pickle weights, which can run code when loaded; qconvert reads safetensors only"
        return FileState(pickles[0].name, pickles[0].stat().st_size, "refused", detail, hint)
    if ggufs := sorted(folder.glob("*.gguf")):
        hint = "get the original checkpoint with safetensors weights"
        return FileState(ggufs[0].name, ggufs[0].stat().st_size, "refused", "GGUF weights are not read", hint)
    return FileState(
        SINGLE_FILE, 0, "missing", "no safetensors weights in the folder", "download the weights"
    )


def _refuse_pointer(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(200)
    if head.startswith(_POINTER_START):
        size = re.search(rb"^size (\d+)$", head, re.MULTILINE)
        meant = f" of {int(size[1]):,} bytes" if size else ""
        raise BrokenFileError("pointer", f"a Git LFS pointer in place of a file{meant}", POINTER_HINT)


def _parse_json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        detail = f"malformed JSON in line {error.lineno}, column {error.colno}: {error.msg}"
        raise BrokenFileError("garbage", detail, "mend or download the file again") from error
    except (ValueError, RecursionError) as error:
        raise BrokenFileError(
            "garbage", f"malformed JSON: {error}", "mend or download the file again"
        ) from error
    if not isinstance(value, dict):
        raise BrokenFileError("garbage", f"holds a JSON {type(value).__name__}, not an object", DOWNLOAD_HINT)
    return value
