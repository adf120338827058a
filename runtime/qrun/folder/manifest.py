"""The model folder's facts, read once into frozen dataclasses.

``qconvert.json`` is written by ``qconvert export`` and described in ``docs/model-folder.md``.
Everything that qrun needs to know about a model before it opens the graph stands in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qrun.errors import QrunError
from qrun.folder.entry import FileEntry, Progress
from qrun.folder.json_file import JsonReader
from qrun.folder.paths import user_path
from qrun.folder.recipe_facts import RecipeFacts, read_recipe

MANIFEST_NAME = "qconvert.json"
FORMAT_NAME = "qconvert-model"
FORMAT_VERSION = 1
PLAN_SUFFIX = ".plan"
KV_DTYPES = ("float32", "float16", "bfloat16", "int8")


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
class PrefillFacts:
    """A second graph that reads prompts: its file, and the fewest tokens that it is given at once."""

    graph: str
    min_tokens: int


@dataclass(frozen=True)
class Origin:
    """Where a folder comes from, for people only: no decision of the program depends on it.

    Attributes:
        parameters: of the model, None where the folder does not say.
        source: the checkpoint's name and files.
        created_by: versions of the programs that made the folder.
        verdict: of the verification, with its measures.
    """

    parameters: int | None
    source: Mapping[str, Any] | None
    created_by: Mapping[str, Any] | None
    verdict: Mapping[str, Any]


@dataclass(frozen=True)
class Manifest:
    """A parsed and checked ``qconvert.json``.

    Attributes:
        verification: "passed", "failed" or "not verified".
        other_graphs: graphs beside ``graph`` by the key that names them, such as "standard_file".
        has_plan: whether a TensorRT plan was built of it.
        raw: the whole JSON object, for whoever writes it again with a change.
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
    recipe: RecipeFacts
    origin: Origin
    other_graphs: Mapping[str, str]
    has_plan: bool
    prefill: PrefillFacts | None = None

    @property
    def graph_path(self) -> Path:
        return self.folder / self.graph

    @property
    def prefill_path(self) -> Path | None:
        return self.folder / self.prefill.graph if self.prefill else None

    def check_files(self, *, hashes: bool = False, progress: Progress | None = None) -> None:
        """Compare the folder with the manifest: sizes always, SHA-256 only when asked.

        Args:
            hashes: also read and hash every file.
            progress: called with (path, bytes read) while hashing.

        Raises:
            QrunError: naming the first file that is missing, truncated or altered; text that people may edit
                must only be there (``edited_files``).
        """
        for entry in self.files:
            entry.check(self.folder, hashes=hashes, progress=progress)

    def edited_files(self) -> tuple[str, ...]:
        """Paths of the text files that somebody has edited since the export."""
        there = [entry for entry in self.files if entry.editable and (self.folder / entry.path).is_file()]
        return tuple(entry.path for entry in there if not entry.check(self.folder))


def forecast_bytes(manifest: Manifest, capacity: int, batch: int = 1) -> int:
    """Bytes that a KV cache of ``capacity`` tokens takes for ``batch`` sequences."""
    return manifest.kv.bytes_per_token * capacity * batch


def weight_bytes(path: str | Path, manifest: Manifest) -> int:
    """Bytes of the files that are read when a folder, or a plan in it, is opened: graphs and weights."""
    path = user_path(path)
    if names_plan(path):
        return path.stat().st_size
    graphs = [manifest.graph, *([manifest.prefill.graph] if manifest.prefill else [])]
    return sum(each.size for each in manifest.files if each.path.startswith(tuple(graphs)))


def names_plan(path: str | Path) -> bool:
    """Whether a path means a TensorRT plan (or its sidecar) and not a model folder."""
    path = user_path(path)
    return path.name.endswith((PLAN_SUFFIX, f"{PLAN_SUFFIX}.json")) and not path.is_dir()


def no_such_plan(path: Path) -> QrunError:
    return QrunError(
        f"no such plan: {path}",
        where=path,
        hint=f"build it with `qconvert build {path.parent}`, a folder exported with --target tensorrt",
    )


def find_model_folder(path: str | Path) -> Path:
    """The model folder that ``path`` means: the folder itself, or a .onnx file or plan inside it.

    Raises:
        QrunError: if there is nothing there, or nothing that qconvert made.
    """
    path = user_path(path)
    if names_plan(path) and not path.exists():
        raise no_such_plan(path)
    if not path.exists():
        raise QrunError(
            f"no such model folder: {path}",
            where=path,
            hint="give the folder that `qconvert export` wrote, such as ./Qwen2.5-1.5B-Instruct-onnx-int8",
        )
    folder = path if path.is_dir() else path.parent
    if path.is_file() and path.suffix != ".onnx" and not names_plan(path):
        raise QrunError(
            f"{path.name} is neither a model folder nor a .onnx file nor a .plan",
            where=path,
            hint=f"give the folder with {MANIFEST_NAME}, or the model.onnx or model.plan inside it",
        )
    if names_plan(path) and not (folder / MANIFEST_NAME).is_file():
        raise QrunError(
            f"{path.name} lies outside its model folder: there is no {MANIFEST_NAME} beside it",
            where=path,
            hint="move it back: manifest, tokenizer and chat template stand in the folder it was built in",
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
    reader = JsonReader.open(
        file,
        title="the manifest",
        remake="export the model again",
        file_format=FORMAT_NAME,
        version=FORMAT_VERSION,
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
    entries = [
        FileEntry(
            entry.path("path", folder="the model folder"), entry.get("size", int), entry.get("sha256", str)
        )
        for entry in reader.objects("files")
    ]
    return Manifest(
        folder=folder,
        name=reader.get("name", str),
        target=reader.get("target", str),
        precision=reader.get("precision", str),
        graph=reader.path("graph.file", folder="the model folder"),
        model=model,
        kv=kv,
        eos_token_ids=_token_ids(reader, "tokens.eos"),
        verification=reader.get("verification.status", str),
        files=tuple(entries),
        raw=reader.raw,
        recipe=read_recipe(reader),
        origin=_origin(reader),
        other_graphs=_other_graphs(reader),
        has_plan="engine" in reader.raw,
        prefill=_prefill(reader),
    )


def _origin(reader: JsonReader) -> Origin:
    parameters = "parameters" in reader.get("model", dict)
    return Origin(
        parameters=reader.positive("model.parameters") if parameters else None,
        source=reader.get("source", dict) if "source" in reader.raw else None,
        created_by=reader.get("created_by", dict) if "created_by" in reader.raw else None,
        verdict=reader.get("verification", dict),
    )


def _other_graphs(reader: JsonReader) -> dict[str, str]:
    keys = [key for key in reader.get("graph", dict) if key.endswith("_file")]
    return {key: reader.path(f"graph.{key}", folder="the model folder") for key in keys}


def _prefill(reader: JsonReader) -> PrefillFacts | None:
    if "prefill" not in reader.get("graph", dict):
        return None
    graph = reader.path("graph.prefill.file", folder="the model folder")
    return PrefillFacts(graph, reader.positive("graph.prefill.min_tokens"))


def _token_ids(reader: JsonReader, key: str) -> tuple[int, ...]:
    value = reader.get(key, list)
    if not all(type(token) is int and token >= 0 for token in value):
        raise reader.refusal(f'"{key}" is {value!r}, not a list of token ids')
    return tuple(value)
