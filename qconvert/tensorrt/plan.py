"""A folder for TensorRT into ``model.plan`` and its sidecar ``model.plan.json``."""

from __future__ import annotations

import errno
import json
import platform
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, BinaryIO

from qconvert.errors import QconvertError
from qconvert.folder.lock import only_changer, only_user
from qconvert.progress import Progress
from qconvert.tensorrt.backends import Backend, BackendName, choose_backend
from qconvert.tensorrt.build import BuilderSettings, Built, build_plan
from qconvert.tensorrt.traps import check_graph, check_scales
from qrun.backends.trt.gpu import first_gpu
from qrun.folder.entry import sha256_of
from qrun.folder.manifest import MANIFEST_NAME, Manifest, read_manifest
from qrun.folder.plan import PLAN_NAME, SIDECAR_FORMAT, SIDECAR_VERSION, Profile, sidecar_of
from qrun.machine import available_memory

SIDECAR_NAME = sidecar_of(Path(PLAN_NAME)).name
# Longer pieces of a prompt are hardly faster, and their activations take memory of the GPU.
DEFAULT_PROMPT_LENGTH = 1024
TYPICAL_PROMPT_LENGTH = 256
# Measured with rtx 1.7.1: 0.4 GB for a tiny model; beyond that the sample took 4.6 times the bytes of its
# bf16 weights and 6.1 times those of its int4 weights. Below four times no build has a chance.
_MEMORY_BASE = 400 << 20
_MEMORY_PER_WEIGHT_BYTE = 4


@dataclass(frozen=True)
class BuildOptions:
    """What a user may choose; see ``qconvert build --help``. Lengths in tokens."""

    backend: BackendName | None = None
    compute_capabilities: tuple[str, ...] = ()
    prompt_length: int | None = None
    opt_level: int | None = None
    workspace_mib: int | None = None
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    strip_weights: bool = False


@dataclass(frozen=True)
class Plan:
    """A plan that stands in its folder, the backend that built it, and what its sidecar says."""

    path: Path
    backend: Backend
    facts: dict[str, Any]


def build(folder: Path, options: BuildOptions, progress: Progress) -> Plan:
    """Build a model folder's plan; what was there before stays until the new one is complete.

    Raises:
        QconvertError: the folder is not for TensorRT, an option does not fit, nothing can build here,
            TensorRT refuses the graph, the disk is full, or another process is changing the folder or the
            timing cache.
        QrunError: the folder is not whole, or altered.
    """
    manifest = read_manifest(folder)
    _check_buildable(manifest)
    backend = choose_backend(options.backend, options.compute_capabilities)
    length, kv_dtype = manifest.model.context_length, manifest.kv.dtype
    check_options(backend, options, cache_length=length, kv_dtype=kv_dtype, where=manifest.folder)
    settings = _settings(manifest, options)
    with only_changer(manifest.folder), only_user(settings.timing_cache):
        return _build(manifest, backend, options, settings, progress)


def _build(
    manifest: Manifest,
    backend: Backend,
    options: BuildOptions,
    settings: BuilderSettings,
    progress: Progress,
) -> Plan:
    with progress.task("hashing the files", sum(entry.size for entry in manifest.files)) as advance:
        manifest.check_files(hashes=True, progress=advance)
    check_graph(manifest.graph_path)
    if backend.name == "tensorrt":
        check_scales(manifest.graph_path)
    _check_memory(manifest)

    started = perf_counter()
    target = manifest.folder / PLAN_NAME
    with _unfinished(target) as (path, file):
        with progress.task(f"building with {backend.title}") as advance:
            built = build_plan(backend, manifest.graph_path, settings, file, advance)
        facts = describe(manifest, backend, options, settings, built)
        facts["built"] = {
            "seconds": round(perf_counter() - started, 1),
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "python": platform.python_version(),
        }
        file.close()
        _publish(manifest, path, target, facts)
    return Plan(target, backend, facts)


def describe(
    manifest: Manifest,
    backend: Backend,
    options: BuildOptions,
    settings: BuilderSettings,
    built: Built,
) -> dict[str, Any]:
    """The sidecar: all that must be known of a plan before anybody deserialises it."""
    hashes = {entry.path: entry.sha256 for entry in manifest.files}
    return {
        "format": SIDECAR_FORMAT,
        "format_version": SIDECAR_VERSION,
        "backend": backend.name,
        "library_version": backend.version,
        "compute_capabilities": list(backend.compute_capabilities or _here()),
        "version_compatible": options.version_compatible,
        "hardware_compatible": options.hardware_compatible,
        "stripped": options.strip_weights,
        "precision": manifest.precision,
        "cache_length": manifest.model.context_length,
        "profiles": [asdict(profile) for profile in settings.profiles],
        "inputs": built.inputs,
        "outputs": built.outputs,
        # Each output of the cache is written where its input lies.
        "aliases": {
            output["name"]: output["name"].replace("present", "past_key_values", 1)
            for output in built.outputs
            if output["name"].startswith("present.")
        },
        "plan": {"file": PLAN_NAME, "size": built.size, "sha256": built.sha256},
        "onnx": {name: hashes[name] for name in (manifest.graph, f"{manifest.graph}.data")},
    }


def _here() -> tuple[str, ...]:
    """The compute capability of the GPU that a plan was just built on."""
    gpu = first_gpu()
    assert gpu is not None, "a build for this machine's GPU needs one"
    return (gpu.compute_capability,)


def _check_buildable(manifest: Manifest) -> None:
    if manifest.target != "tensorrt":
        raise QconvertError(
            f'the folder was exported for "{manifest.target}", and TensorRT refuses its operators',
            where=manifest.folder,
            hint="export it with `qconvert export CHECKPOINT --target tensorrt`",
        )
    if manifest.precision == "fp32":
        raise QconvertError(
            "TensorRT has no attention kernel in float32: an fp32 folder is for comparison only",
            where=manifest.folder,
            hint="export it with --precision bf16, fp16 or int4",
        )


def check_options(
    backend: Backend, options: BuildOptions, *, cache_length: int, kv_dtype: str, where: Path | None = None
) -> None:
    """Refuse options that do not fit the backend, or a model with a cache of this length and type.

    Raises:
        QconvertError: names the option and what to do.
    """
    most = options.prompt_length
    if most is not None and not 1 <= most <= cache_length:
        raise QconvertError(
            f"--prompt-length {most:,} is not within 1 and the cache's {cache_length:,} tokens",
            hint="leave --prompt-length out: longer prompts are read in pieces",
        )
    older = [capability for capability in backend.compute_capabilities if float(capability) < 8.0]
    if older and kv_dtype == "bfloat16":
        raise QconvertError(
            f"GPUs of compute capability {older[0]} have no bfloat16, in which this folder computes",
            where=where,
            hint="export it with --precision fp16",
        )
    if options.timing_cache is not None and backend.compute_capabilities:
        raise QconvertError(
            "a timing cache holds what a GPU was measured to do, and this build asks none",
            hint="leave --timing-cache out, or build on the GPU itself without --compute-capability",
        )
    if options.strip_weights and backend.compute_capabilities:
        raise QconvertError(
            "a plan without weights cannot be built ahead of time: rtx compiles what is refitted on the GPU",
            hint="leave --strip-weights out, or build on the GPU itself without --compute-capability",
        )
    if options.version_compatible and backend.name == "rtx":
        raise QconvertError(
            "rtx cannot make version-compatible plans: its packages lack the runtime that opens them",
            hint="leave --version-compatible out, and build again after an update",
        )
    if options.hardware_compatible and backend.name == "rtx":
        raise QconvertError(
            "rtx has no hardware-compatible plans: it builds for several compute capabilities at once",
            hint="name each of them: --compute-capability 8.9 --compute-capability 12.0",
        )


def _settings(manifest: Manifest, options: BuildOptions) -> BuilderSettings:
    length = manifest.model.context_length
    most = min(DEFAULT_PROMPT_LENGTH, length) if options.prompt_length is None else options.prompt_length
    return BuilderSettings(
        profiles=(
            Profile("decode", 1, 1, 1),
            Profile("prompt", 1, min(TYPICAL_PROMPT_LENGTH, most), most),
        ),
        opt_level=options.opt_level,
        workspace_bytes=None if options.workspace_mib is None else options.workspace_mib << 20,
        timing_cache=options.timing_cache,
        version_compatible=options.version_compatible,
        hardware_compatible=options.hardware_compatible,
        strip_weights=options.strip_weights,
    )


def _check_memory(manifest: Manifest) -> None:
    weights = (manifest.folder / f"{manifest.graph}.data").stat().st_size
    needed, free = _MEMORY_BASE + _MEMORY_PER_WEIGHT_BYTE * weights, available_memory()
    if free is not None and needed > free:
        raise QconvertError(
            f"a build of {weights / 1e9:.2f} GB of weights takes over {needed / 1e9:.1f} GB of memory, "
            f"{free / 1e9:.1f} GB are free",
            where=manifest.folder,
            hint="free some memory, or export with --precision int4",
        )


@contextmanager
def _unfinished(target: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """A temporary file beside ``target``, removed at the end unless it was renamed."""
    path = target.with_name(f".{target.name}.tmp")
    try:
        with path.open("wb") as file:
            yield path, file
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise QconvertError(
            "no space left on the disk" if full else f"cannot write the plan: {error.strerror or error}",
            where=target,
            hint="free some space" if full else "check the folder's permissions",
        ) from error
    finally:
        path.unlink(missing_ok=True)


def _publish(manifest: Manifest, plan: Path, target: Path, facts: dict[str, Any]) -> None:
    """Give plan, sidecar and manifest their names, in this order; hashes show an interrupted set."""
    sidecar = manifest.folder / SIDECAR_NAME
    entries = [asdict(entry) for entry in manifest.files if entry.path not in (PLAN_NAME, SIDECAR_NAME)]
    written = _write_beside(sidecar, facts)
    entries.append({"path": PLAN_NAME, "size": plan.stat().st_size, "sha256": facts["plan"]["sha256"]})
    entries.append({"path": SIDECAR_NAME, "size": written.stat().st_size, "sha256": sha256_of(written)})
    summary = {key: facts[key] for key in ("backend", "library_version", "compute_capabilities")}
    engine = {"file": PLAN_NAME, "sidecar": SIDECAR_NAME, **summary}
    new_manifest = _write_beside(
        manifest.folder / MANIFEST_NAME, {**manifest.raw, "engine": engine, "files": entries}
    )
    plan.replace(target)
    written.replace(sidecar)
    new_manifest.replace(manifest.folder / MANIFEST_NAME)


def _write_beside(path: Path, value: dict[str, Any]) -> Path:
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return beside
