"""Whether this machine can open a plan, told from its sidecar: library, version, GPU, memory."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from qrun.backends.trt.cuda import open_device
from qrun.errors import QrunError
from qrun.folder.manifest import Manifest
from qrun.folder.plan import BACKENDS, PlanFacts

MODULES = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}
HOW_TO_INSTALL = {
    "tensorrt": "pip install 'qconvert[tensorrt]' (its libraries come from NVIDIA's own package index)",
    "rtx": "pip install 'qconvert[rtx]'",
}


def load_backend_module(facts: PlanFacts) -> Any:
    """Import the TensorRT that can open the plan: the module ``tensorrt`` or ``tensorrt_rtx``.

    Raises:
        QrunError: it is not installed, or its libraries do not load.
    """
    name = MODULES[facts.backend]
    try:
        return import_module(name)
    except ImportError as error:
        if not (isinstance(error, ModuleNotFoundError) and error.name == name):
            raise QrunError(
                f"{name} cannot be loaded: {error}", where=facts.path, hint=HOW_TO_INSTALL[facts.backend]
            ) from error
        other = next(backend for backend in BACKENDS if backend != facts.backend)
        have = find_spec(MODULES[other]) is not None
        raise QrunError(
            f"the plan was built with {facts.title}, and {name} is not installed"
            + (f"; {MODULES[other]} is, and cannot open it" if have else ""),
            where=facts.path,
            hint=HOW_TO_INSTALL[facts.backend]
            + (f"; or build the plan anew: qconvert build {facts.folder} --backend {other}" if have else ""),
        ) from error


def check_runnable(facts: PlanFacts, module_version: str, compute_capability: str) -> None:
    """Hold the plan against the library that is installed and the GPU that is there.

    Args:
        facts: the plan's.
        module_version: ``__version__`` of the backend's module.
        compute_capability: the GPU's, such as "8.9".

    Raises:
        QrunError: another version, another compute capability, or a plan without weights.
    """
    if module_version != facts.library_version and not (
        facts.version_compatible and _numbers(module_version) >= _numbers(facts.library_version)
    ):
        raise QrunError(
            f"the plan was built with {facts.title}, and {module_version} is installed: it opens in its own "
            "version only",
            where=facts.path,
            hint=f"build it anew: {facts.build_again}; or install that version: "
            f"pip install {MODULES[facts.backend].replace('_', '-')}=={facts.library_version}",
        )
    fits = compute_capability in facts.compute_capabilities or (
        facts.hardware_compatible and _numbers(compute_capability) >= (8, 0)
    )
    if not fits:
        named = f" --compute-capability {compute_capability}" if facts.backend == "rtx" else ""
        raise QrunError(
            f"the plan was built for compute capability {', '.join(facts.compute_capabilities)}, and this "
            f"machine's GPU has {compute_capability}",
            where=facts.path,
            hint=f"build it anew: {facts.build_again}{named}",
        )
    if facts.stripped:
        raise QrunError(
            "the plan was built without its weights, and qrun does not put them back",
            where=facts.path,
            hint=f"build it without --strip-weights: {facts.build_again}",
        )


def forecast_device_bytes(facts: PlanFacts, manifest: Manifest) -> dict[str, int]:
    """GPU memory that is known before the plan is opened: the plan itself, and the KV cache at its length."""
    return {"plan": facts.plan_size, "kv_cache": manifest.kv.bytes_per_token * facts.cache_length}


def check_device_memory(facts: PlanFacts, manifest: Manifest, free: int, workspace: int = 0) -> None:
    """Raise with the forecast where the GPU has too little memory left.

    Args:
        facts: the plan's.
        manifest: the model folder's.
        free: bytes that the GPU has free.
        workspace: scratch memory of the execution context in bytes, where it is known.

    Raises:
        QrunError: says what is needed, for what.
    """
    parts = forecast_device_bytes(facts, manifest)
    needed = sum(parts.values()) + workspace
    if needed > free:
        scratch = f", workspace {workspace / 1e9:.2f} GB" if workspace else ""
        raise QrunError(
            f"the plan needs {needed / 1e9:.2f} GB of GPU memory, {free / 1e9:.2f} GB are free: "
            f"plan {parts['plan'] / 1e9:.2f} GB, KV cache of {facts.cache_length:,} tokens "
            f"{parts['kv_cache'] / 1e9:.2f} GB{scratch}",
            where=facts.path,
            hint="free GPU memory; or export with a smaller --max-length or with --precision int4, "
            "and build again",
        )


def why_not_here(facts: PlanFacts, manifest: Manifest) -> QrunError | None:
    """What keeps this machine from running the plan, as opening it would say; None where nothing is known to.

    Nothing is deserialised, and the GPU's memory is only counted.
    """
    try:
        facts.check_belongs(manifest)
        module = load_backend_module(facts)
        gpu = open_device()
        check_runnable(facts, str(module.__version__), gpu.compute_capability)
        check_device_memory(facts, manifest, gpu.free_bytes())
    except QrunError as error:
        return error
    return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
