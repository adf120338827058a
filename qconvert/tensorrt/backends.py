"""Which TensorRT builds the plan: ``tensorrt``, which needs a GPU, or ``tensorrt_rtx``, which does not."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qconvert.errors import QconvertError
from qrun.backends.trt.checks import HOW_TO_INSTALL, MODULES
from qrun.backends.trt.gpu import why_no_gpu
from qrun.folder.plan import TITLES

BackendName = Literal["tensorrt", "rtx"]


@dataclass(frozen=True)
class Backend:
    """An imported TensorRT and what it will build for.

    Attributes:
        name: "tensorrt" or "rtx".
        module: the imported module; both have the same classes.
        compute_capabilities: "8.9" and the like; empty means the GPU of this machine.
        reason: why it was chosen, for people.
    """

    name: BackendName
    module: Any
    compute_capabilities: tuple[str, ...]
    reason: str

    @property
    def version(self) -> str:
        return str(self.module.__version__)

    @property
    def title(self) -> str:
        return f"{TITLES[self.name]} {self.version}"


def choose_backend(name: BackendName | None, compute_capabilities: Sequence[str]) -> Backend:
    """The backend that the user named, or the one that is installed and can build here.

    Raises:
        QconvertError: it is not installed, or needs a GPU or a compute capability that is not there.
    """
    wanted = tuple(dict.fromkeys(compute_capabilities))
    if name is not None:
        return Backend(name, _usable(name, wanted), wanted, "named with --backend")
    if wanted:
        reason = "only rtx builds for named compute capabilities"
        return Backend("rtx", _usable("rtx", wanted), wanted, reason)
    refusals = []
    candidates: tuple[BackendName, ...] = ("tensorrt", "rtx")
    for candidate in candidates:
        try:
            module = _usable(candidate, wanted)
        except QconvertError as error:
            refusals.append(error)
            continue
        before = f"; {refusals[0].what}" if refusals else ""
        return Backend(candidate, module, wanted, f"installed, and a GPU is there{before}")
    raise QconvertError(
        "nothing here can build a plan: " + "; ".join(error.what for error in refusals),
        hint=refusals[-1].hint,
    )


def _usable(name: BackendName, compute_capabilities: tuple[str, ...]) -> Any:
    """The imported module, if it can build for the wanted compute capabilities."""
    try:
        module = importlib.import_module(MODULES[name])
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == MODULES[name]
        state = "is not installed" if missing else f"cannot be loaded: {error}"
        raise QconvertError(f"{MODULES[name]} {state}", hint=HOW_TO_INSTALL[name]) from error
    gpu = why_no_gpu()
    if name == "tensorrt":
        if compute_capabilities:
            raise QconvertError(
                "tensorrt builds for the GPU of this machine only, not for a named compute capability",
                hint="leave --compute-capability out, or use --backend rtx",
            )
        if gpu is not None:
            raise QconvertError(
                f"tensorrt needs a GPU to build, and {gpu}",
                hint="build on the machine with the GPU, or use --backend rtx --compute-capability 8.9",
            )
    elif not compute_capabilities and gpu is not None:
        raise QconvertError(
            f"rtx needs to know what to build for: no compute capability is named, and {gpu}",
            hint="name it: --compute-capability 8.9 (RTX 40), 12.0 (RTX 50), 8.6 (RTX 30), 7.5 (RTX 20)",
        )
    known = known_compute_capabilities(module)
    for capability in compute_capabilities:
        if capability not in known:
            raise QconvertError(
                f"{MODULES[name]} {module.__version__} cannot build for compute capability {capability}",
                hint=f"use one of {', '.join(known)}",
            )
    return module


def known_compute_capabilities(module: Any) -> dict[str, Any]:
    """What TensorRT-RTX can be told to build for: "8.9" and its enum member; empty for TensorRT."""
    members = getattr(getattr(module, "ComputeCapability", None), "__members__", {})
    numbered = {name[2:]: value for name, value in members.items() if name.startswith("SM")}
    return {f"{digits[:-1]}.{digits[-1]}": numbered[digits] for digits in sorted(numbered, key=int)}
