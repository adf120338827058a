"""ONNX Runtime's two wheels: one must be installed, and only one, and new enough for the model."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec

from qrun.errors import QrunError
from qrun.folder.manifest import Manifest

# Tried with each minor version from 1.22 to 1.29, on the CPU; `make test-oldest` tests with the lowest.
# 1.25 and 1.26 open a graph with a cache of 8 bits, but fail in GroupQueryAttention when they run it.
_LOWEST = (1, 23)
_WITH_INT8_CACHE = (1, 27)
_WITH_STATIC_CACHE = (1, 25)  # TensorScatter
_LAST_FOR_PYTHON_3_10 = (1, 23)


def check_onnxruntime_wheels(device: str = "cpu") -> None:
    """Raise where ONNX Runtime is missing, doubled, or the wrong one for ``device``.

    Both wheels install the module ``onnxruntime``: whichever comes second overwrites half of the
    first, and imports then fail in ways that do not name the cause.

    Raises:
        QrunError: says which pip commands mend it.
    """
    cpu, gpu = _installed("onnxruntime"), _installed("onnxruntime-gpu")
    if cpu and gpu:
        raise QrunError(
            "both onnxruntime and onnxruntime-gpu are installed, and they overwrite each other",
            hint="pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'qconvert[cpu]' "
            "or pip install 'qconvert[gpu]'",
        )
    if find_spec("onnxruntime") is None:
        raise QrunError(
            "ONNX Runtime is not installed",
            hint="pip install 'qconvert[cpu]', or 'qconvert[gpu]' for NVIDIA GPUs",
        )
    if device != "cpu" and not gpu:
        raise QrunError(
            f"--device {device} needs ONNX Runtime's GPU wheel, and the CPU wheel is installed",
            hint="pip uninstall -y onnxruntime, then pip install 'qconvert[gpu]'",
        )


def check_onnxruntime_version(manifest: Manifest, version: str | None = None) -> None:
    """Refuse a model for which the installed ONNX Runtime is too old, before it fails in its own words.

    Args:
        manifest: of the model.
        version: of ONNX Runtime; by default that of the installed wheel.

    Raises:
        QrunError: says which version it needs and how to get it.
    """
    needed, what = _LOWEST, "this model"
    if manifest.target == "tensorrt":
        needed, what = _WITH_STATIC_CACHE, "a folder for TensorRT"
    if manifest.kv.dtype == "int8":
        needed, what = _WITH_INT8_CACHE, "a KV cache of 8 bits"
    version = version or _version_of("onnxruntime") or _version_of("onnxruntime-gpu")
    if version is None or numbers(version) >= needed:  # a wheel under another name is not judged
        return
    name = "onnxruntime-gpu" if _installed("onnxruntime-gpu") else "onnxruntime"
    hint = f"pip install -U {name}"
    if sys.version_info < (3, 11) and needed > _LAST_FOR_PYTHON_3_10:
        hint += ", with Python 3.11 or later: there is none for 3.10"
        hint += "; or export without --kv-cache int8" if manifest.kv.dtype == "int8" else ""
    raise QrunError(
        f"{what} needs ONNX Runtime {needed[0]}.{needed[1]} or later, and {version} is installed",
        where=manifest.folder,
        hint=hint,
    )


def numbers(version: str) -> tuple[int, ...]:
    """Major and minor: (1, 27) for "1.27.0rc1"."""
    return tuple(int(part) for part in version.split(".")[:2])


def _installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def _version_of(name: str) -> str | None:
    return distribution(name).version if _installed(name) else None
