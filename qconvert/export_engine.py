"""``qconvert export --engine``: a checkpoint to a plan in one go, by the same export and build as by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qconvert.errors import QconvertError
from qconvert.export import ExportOptions
from qconvert.progress import Progress
from qconvert.targets import DEFAULT_STATIC_LENGTH
from qconvert.tensorrt.backends import choose_backend
from qconvert.tensorrt.plan import BuildOptions, Plan, build, check_options
from qrun.errors import QrunError


def prepare(target: str | None, options: ExportOptions, build_options: BuildOptions) -> ExportOptions:
    """Refuse before the export, which takes minutes, what the build would refuse after it.

    Args:
        target: what --target says, or None.

    Returns:
        The options with the target of an engine.

    Raises:
        QconvertError: another target, a precision that TensorRT cannot run, nothing that can build here, or
            build options that do not fit.
    """
    if target not in (None, "tensorrt"):
        raise QconvertError(
            f"--engine builds a TensorRT plan, and --target {target} is not for TensorRT",
            hint="leave --target out, or leave --engine out",
        )
    if options.precision == "fp32":
        raise QconvertError(
            "TensorRT has no attention kernel in float32: no plan can be built of --precision fp32",
            hint="use --precision bf16, fp16 or int4; or leave --engine out, and compare on the CPU",
        )
    backend = choose_backend(build_options.backend, build_options.compute_capabilities)
    length = DEFAULT_STATIC_LENGTH if options.max_length is None else options.max_length
    kv_dtype = "float16" if options.precision == "fp16" else "bfloat16"
    check_options(backend, build_options, cache_length=length, kv_dtype=kv_dtype)
    return replace(options, target="tensorrt")


def build_exported(folder: Path, options: BuildOptions, progress: Progress) -> Plan:
    """Build the plan of a folder that was just exported; the folder stays if that fails.

    Raises:
        QconvertError: the build's own refusal, and how to go on.
    """
    try:
        return build(folder, options, progress)
    except QrunError as error:
        raise QconvertError(
            f"{folder} is exported, and its plan was not built: {error.what}",
            where=error.where,
            hint=f"{error.hint or 'see above'}. The export need not be repeated: go on with "
            f"`{_command(folder, options)}`",
        ) from error


def _command(folder: Path, options: BuildOptions) -> str:
    """The build alone, as it would be typed."""
    given = {"--backend": options.backend, "--prompt-length": options.prompt_length}
    words = [f"{name} {value}" for name, value in given.items() if value is not None]
    words += [f"--compute-capability {capability}" for capability in options.compute_capabilities]
    return " ".join(["qconvert build", str(folder), *words])
