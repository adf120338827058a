"""A TensorRT plan's facts, read from its sidecar before the plan is deserialised.

``model.plan.json`` is written by ``qconvert build`` and described in ``docs/model-folder.md``. A plan is
code for the GPU: only the backend, the version and the kind of GPU that it was built for can open it, unless
it was built to be compatible with others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from qrun.errors import QrunError
from qrun.folder.entry import sha256_of
from qrun.folder.json_file import JsonReader
from qrun.folder.manifest import PLAN_SUFFIX, Manifest, no_such_plan
from qrun.folder.paths import user_path

PLAN_NAME = f"model{PLAN_SUFFIX}"
SIDECAR_FORMAT = "qconvert-plan"
SIDECAR_VERSION = 1
BACKENDS = ("tensorrt", "rtx")
TITLES = {"tensorrt": "TensorRT", "rtx": "TensorRT-RTX"}
_DTYPES = ("float32", "float16", "bfloat16", "int64", "int32")
_COPY_AGAIN = "copy the folder again as a whole, or build it again with `qconvert build FOLDER`"


@dataclass(frozen=True)
class Profile:
    """Lengths of ``input_ids`` for which a plan is tuned: least, typical and most tokens at once."""

    name: str
    least: int
    typical: int
    most: int


@dataclass(frozen=True)
class Tensor:
    """An input or output of the plan; -1 in ``shape`` is told at run time."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class PlanFacts:
    """A parsed and checked ``model.plan.json``.

    Attributes:
        path: the plan.
        folder: its model folder, in which it lies.
        backend: "tensorrt" or "rtx"; ``library_version`` built it.
        compute_capabilities: "8.9" and the like.
        version_compatible: later versions can open it, too.
        hardware_compatible: every GPU from Ampere (8.0) on can run it.
        stripped: it has no weights.
        cache_length: tokens that the KV cache holds.
        aliases: an output's name to the input whose memory it is written to.
        onnx: files of the folder that the plan was made of, and their SHA-256.
        plan_size, plan_sha256: bytes of the plan, and its SHA-256 in hex.
    """

    path: Path
    folder: Path
    backend: str
    library_version: str
    compute_capabilities: tuple[str, ...]
    version_compatible: bool
    hardware_compatible: bool
    stripped: bool
    precision: str
    cache_length: int
    profiles: tuple[Profile, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    aliases: Mapping[str, str]
    onnx: Mapping[str, str]
    plan_size: int
    plan_sha256: str

    @property
    def title(self) -> str:
        """The backend for people: "TensorRT-RTX 1.7.1.116"."""
        return f"{TITLES[self.backend]} {self.library_version}"

    @property
    def build_again(self) -> str:
        """The command that builds this plan anew."""
        return f"qconvert build {self.folder} --backend {self.backend}"

    def check_bytes(self, progress: Callable[[str, int], None] | None = None) -> None:
        """Compare the plan's SHA-256, as must be done before it is deserialised (about a second per GB).

        Args:
            progress: called with (file name, bytes read).

        Raises:
            QrunError: the bytes are not those that were built.
        """
        if sha256_of(self.path, progress) != self.plan_sha256:
            raise QrunError(
                f"{self.path.name} is altered: its SHA-256 is not the sidecar's",
                where=self.path,
                hint=_COPY_AGAIN,
            )

    def check_belongs(self, manifest: Manifest) -> None:
        """Raise a ``QrunError`` unless the plan was made of this folder's very graph and weights."""
        hashes = {entry.path: entry.sha256 for entry in manifest.files}
        strangers = [name for name, sha256 in self.onnx.items() if hashes.get(name) != sha256]
        if strangers or self.cache_length != manifest.model.context_length:
            raise QrunError(
                f"{self.path.name} was built from another model than this folder's",
                where=self.path,
                hint=f"move it back to its own folder, or build this one: {self.build_again}",
            )


def sidecar_of(plan: Path) -> Path:
    """Where a plan's sidecar lies: beside it."""
    return plan.with_name(f"{plan.name}.json")


def read_plan(path: str | Path) -> PlanFacts:
    """Read and check the sidecar of a plan, given the plan or the sidecar; sizes are compared, too.

    Raises:
        QrunError: no plan there, no sidecar, a malformed or newer one, or another number of bytes.
    """
    path = user_path(path)
    if path.name.endswith(f"{PLAN_SUFFIX}.json"):
        path = path.with_name(path.name.removesuffix(".json"))
    _check_there(path)
    reader = JsonReader.open(
        sidecar_of(path),
        title="the plan's sidecar",
        remake=f"build the plan again: qconvert build {path.parent}",
        file_format=SIDECAR_FORMAT,
        version=SIDECAR_VERSION,
    )
    name = reader.path("plan.file", folder="the model folder")
    if name != path.name:
        raise reader.refusal(f'"plan.file" is {name!r}, and the plan beside it is {path.name!r}')
    facts = PlanFacts(
        path=path,
        folder=path.parent,
        backend=reader.one_of("backend", BACKENDS),
        library_version=reader.get("library_version", str),
        compute_capabilities=reader.strings("compute_capabilities"),
        version_compatible=reader.get("version_compatible", bool),
        hardware_compatible=reader.get("hardware_compatible", bool),
        stripped=reader.get("stripped", bool),
        precision=reader.get("precision", str),
        cache_length=reader.positive("cache_length"),
        profiles=tuple(map(_profile, reader.objects("profiles"))),
        inputs=tuple(map(_tensor, reader.objects("inputs"))),
        outputs=tuple(map(_tensor, reader.objects("outputs"))),
        aliases=reader.string_map("aliases"),
        onnx=reader.string_map("onnx"),
        plan_size=reader.positive("plan.size"),
        plan_sha256=reader.get("plan.sha256", str),
    )
    size = path.stat().st_size
    if size != facts.plan_size:
        state = "empty" if size == 0 else "truncated" if size < facts.plan_size else "altered"
        raise QrunError(
            f"{path.name} is {state}: {size:,} bytes, its sidecar says {facts.plan_size:,}",
            where=path,
            hint=_COPY_AGAIN,
        )
    return facts


def _check_there(path: Path) -> None:
    if path.is_dir():
        raise QrunError(
            f"{path.name} is a folder and not a plan",
            where=path,
            hint="give the plan that `qconvert build FOLDER` wrote, such as FOLDER/model.plan",
        )
    if not path.is_file():
        raise no_such_plan(path)
    if not sidecar_of(path).is_file():
        raise QrunError(
            f"{path.name} has no sidecar: nothing says what it is, and nothing would check its bytes",
            where=sidecar_of(path),
            hint="copy the sidecar from where the plan was built, or build it anew with "
            f"`qconvert build {path.parent}`",
        )


def _profile(reader: JsonReader) -> Profile:
    lengths = [reader.positive(key) for key in ("least", "typical", "most")]
    if lengths != sorted(lengths):
        raise reader.refusal(f'"profiles" has lengths that do not rise: {lengths}')
    return Profile(reader.get("name", str), *lengths)


def _tensor(reader: JsonReader) -> Tensor:
    shape = reader.get("shape", list)
    if not all(type(size) is int and size >= -1 for size in shape):
        raise reader.refusal(f'"shape" is {shape!r}, not a list of sizes')
    return Tensor(reader.get("name", str), reader.one_of("dtype", _DTYPES), tuple(shape))
