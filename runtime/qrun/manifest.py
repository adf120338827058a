"""The model folder's facts, read once into frozen dataclasses.

``qconvert.json`` is written by ``qconvert export`` and described in ``docs/model-folder.md``.
Everything that qrun needs to know about a model before it opens the graph stands in it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from qrun.errors import QrunError

MANIFEST_NAME = "qconvert.json"
FORMAT_NAME = "qconvert-model"
FORMAT_VERSION = 1
KV_DTYPES = ("float32", "float16", "bfloat16")

T = TypeVar("T")


@dataclass(frozen=True)
class FileEntry:
    """One file of the folder: POSIX path relative to it, size in bytes, SHA-256 in hex."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of the decoder, in the terms of its config.json; ``context_length`` in tokens."""

    architecture: str
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_size: int
    hidden_size: int
    vocab_size: int
    context_length: int


@dataclass(frozen=True)
class KVFacts:
    """KV cache: element type and the bytes of keys and values of all layers for one token."""

    dtype: str
    bytes_per_token: int


@dataclass(frozen=True)
class Manifest:
    """A parsed and checked ``qconvert.json``.

    ``verification`` is "passed", "failed" or "not verified". ``raw`` is the whole JSON object.
    """

    folder: Path
    name: str
    target: str
    precision: str
    graph: str
    model: ModelFacts
    kv: KVFacts
    eos_token_ids: tuple[int, ...]
    verification: str
    files: tuple[FileEntry, ...]
    raw: Mapping[str, Any]

    @property
    def graph_path(self) -> Path:
        return self.folder / self.graph

    def check_files(
        self, *, hashes: bool = False, progress: Callable[[str, int], None] | None = None
    ) -> None:
        """Compare the folder with the manifest: sizes always, SHA-256 only when asked.

        Args:
            hashes: also read and hash every file.
            progress: called with (path, bytes read) while hashing.

        Raises:
            QrunError: naming the first file that is missing, truncated or altered.
        """
        for entry in self.files:
            path = self.folder / entry.path
            if not path.is_file():
                raise QrunError(
                    f"{entry.path} is missing from the model folder",
                    where=path,
                    hint="copy the folder again as a whole, or export it again with `qconvert export`",
                )
            size = path.stat().st_size
            if size != entry.size:
                state = "truncated" if size < entry.size else "altered"
                raise QrunError(
                    f"{entry.path} is {state}: {size:,} bytes, the manifest says {entry.size:,}",
                    where=path,
                    hint="copy the folder again as a whole, or export it again with `qconvert export`",
                )
            if hashes and sha256_of(path, progress) != entry.sha256:
                raise QrunError(
                    f"{entry.path} is altered: its SHA-256 is not the manifest's",
                    where=path,
                    hint="copy the folder again as a whole, or export it again with `qconvert export`",
                )


def sha256_of(path: Path, progress: Callable[[str, int], None] | None = None) -> str:
    """SHA-256 of a file in hex, read in pieces of 4 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            if progress is not None:
                progress(path.name, len(chunk))
    return digest.hexdigest()


def find_model_folder(path: str | Path) -> Path:
    """The model folder that ``path`` means: the folder itself or a .onnx file inside it.

    Raises:
        QrunError: if there is nothing there, or nothing that qconvert made.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise QrunError(
            f"no such model folder: {path}",
            where=path,
            hint="give the folder that `qconvert export` wrote, such as ./Qwen2.5-1.5B-Instruct-onnx-int8",
        )
    folder = path if path.is_dir() else path.parent
    if path.is_file() and path.suffix != ".onnx":
        raise QrunError(
            f"{path.name} is neither a model folder nor a .onnx file",
            where=path,
            hint=f"give the folder with {MANIFEST_NAME}, or the model.onnx inside it",
        )
    if not (folder / MANIFEST_NAME).is_file():
        checkpoint = (folder / "config.json").is_file() and not list(folder.glob("*.onnx"))
        raise QrunError(
            f"{folder} is not a folder that qconvert made: it has no {MANIFEST_NAME}",
            where=folder,
            hint=(
                f"this looks like a checkpoint: convert it first with `qconvert export {folder}`"
                if checkpoint
                else "convert the original checkpoint with `qconvert export CHECKPOINT`"
            ),
        )
    return folder


def read_manifest(path: str | Path) -> Manifest:
    """Read and check ``qconvert.json`` of a model folder (or of the folder around a .onnx file).

    Raises:
        QrunError: no folder, no manifest, malformed JSON, a missing or mistyped key, a newer
            format, or a path that leaves the folder.
    """
    folder = find_model_folder(path)
    file = folder / MANIFEST_NAME
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise QrunError(
            f"the manifest cannot be read: {error}", where=file, hint="export the model again"
        ) from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT_NAME:
        raise QrunError(
            f'the manifest is not ours: "format" is not "{FORMAT_NAME}"',
            where=file,
            hint="give a folder that `qconvert export` wrote",
        )
    reader = _Reader(file, raw)
    version = reader.get("format_version", int)
    if version > FORMAT_VERSION:
        raise QrunError(
            f"the folder has format version {version}; this qrun reads up to {FORMAT_VERSION}",
            where=file,
            hint="update it: pip install -U qconvert",
        )
    model = ModelFacts(
        architecture=reader.get("model.architecture", str),
        **{
            field: reader.positive(f"model.{field}")
            for field in (
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "head_size",
                "hidden_size",
                "vocab_size",
                "context_length",
            )
        },
    )
    kv = KVFacts(reader.one_of("kv_cache.dtype", KV_DTYPES), reader.positive("kv_cache.bytes_per_token"))
    entries = []
    for item in reader.get("files", list):
        entry = _Reader(file, item if isinstance(item, dict) else {})
        entries.append(
            FileEntry(_inside(file, entry.get("path", str)), entry.get("size", int), entry.get("sha256", str))
        )
    return Manifest(
        folder=folder,
        name=reader.get("name", str),
        target=reader.get("target", str),
        precision=reader.get("precision", str),
        graph=_inside(file, reader.get("graph.file", str)),
        model=model,
        kv=kv,
        eos_token_ids=reader.token_ids("tokens.eos"),
        verification=reader.get("verification.status", str),
        files=tuple(entries),
        raw=raw,
    )


class _Reader:
    """Reads dotted keys out of a JSON object and says which one is missing or mistyped."""

    def __init__(self, file: Path, raw: Mapping[str, Any]) -> None:
        self.file = file
        self.raw = raw

    def get(self, key: str, kind: type[T]) -> T:
        value: Any = self.raw
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            found = "is missing" if value is None else f"is {value!r}, not of type {kind.__name__}"
            raise QrunError(
                f'the manifest\'s "{key}" {found}', where=self.file, hint="export the model again"
            )
        return value

    def one_of(self, key: str, known: tuple[str, ...]) -> str:
        value = self.get(key, str)
        if value not in known:
            raise QrunError(
                f'the manifest\'s "{key}" is {value!r}, not one of {", ".join(known)}',
                where=self.file,
                hint="update it: pip install -U qconvert; or export the model again",
            )
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        value = self.get(key, list)
        if not all(type(token) is int and token >= 0 for token in value):
            raise QrunError(
                f'the manifest\'s "{key}" is {value!r}, not a list of token ids',
                where=self.file,
                hint="export the model again",
            )
        return tuple(value)

    def positive(self, key: str) -> int:
        value = self.get(key, int)
        if value <= 0:
            raise QrunError(
                f'the manifest\'s "{key}" is {value}, not a positive number',
                where=self.file,
                hint="export the model again",
            )
        return value


def _inside(file: Path, name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or not path.parts:
        raise QrunError(
            f"the manifest names a path outside the model folder: {name!r}",
            where=file,
            hint="do not use this folder: it was not written by qconvert",
        )
    return name
