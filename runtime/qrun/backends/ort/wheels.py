"""ONNX Runtime's two wheels: one must be installed, and only one."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec

from qrun.errors import QrunError


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


def _installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True
