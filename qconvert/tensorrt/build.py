"""One ONNX graph into one plan: the same calls for both of NVIDIA's modules."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from qconvert.errors import QconvertError
from qconvert.tensorrt.backends import Backend, known_compute_capabilities
from qrun.backends.trt.log import error_log
from qrun.folder.plan import Profile

_TYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64", "INT32": "int32"}


@dataclass(frozen=True)
class BuilderSettings:
    """What the builder is told; None leaves TensorRT's own default."""

    profiles: tuple[Profile, ...]
    opt_level: int | None = None
    workspace_bytes: int | None = None
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    strip_weights: bool = False


@dataclass(frozen=True)
class Built:
    """What came out: bytes and SHA-256 of the plan, and the network's inputs and outputs."""

    size: int
    sha256: str
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]


def build_plan(
    backend: Backend, graph: Path, settings: BuilderSettings, output: BinaryIO, advance: Callable[..., None]
) -> Built:
    """Parse ``graph`` and write its plan to ``output`` as TensorRT makes it.

    Ctrl-C and SIGTERM ask TensorRT to stop at its next step; once it has, their exception goes on. TensorRT
    runs in a thread of its own: Python raises such exceptions in the first thread only, and TensorRT would
    swallow them in any of its calls back to us.

    Raises:
        QconvertError: the parser or the builder refuses the graph, in their words and with node names.
        OSError: the plan cannot be written.
    """
    monitor = _monitor(backend.module, advance)
    with ThreadPoolExecutor(1, thread_name_prefix="TensorRT") as worker:
        building = worker.submit(_build, backend, graph, settings, output, monitor)
        interruption: BaseException | None = None
        while not building.done():
            try:
                wait([building], 0.1)
            except (KeyboardInterrupt, SystemExit) as error:
                interruption, monitor.cancelled = error, True
    if interruption is not None:
        raise interruption
    return building.result()


def _build(backend: Backend, graph: Path, settings: BuilderSettings, output: BinaryIO, monitor: Any) -> Built:
    trt = backend.module
    logger = error_log(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(0)  # networks are always strongly typed
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        raise _refusal(backend, graph, [f"{e.node_name()} ({e.node_operator()}): {e.desc()}" for e in errors])

    config = builder.create_builder_config()
    config.progress_monitor = monitor
    _configure(backend, config, settings)
    for profile in settings.profiles:
        config.add_optimization_profile(_optimization_profile(builder, network, profile))
    writer = _writer(trt, output)
    done = builder.build_serialized_network_to_stream(network, config, writer)
    if writer.error is not None:
        raise writer.error
    if not done:
        # Where there is no GPU, TensorRT also complains of the missing driver, whatever the true cause.
        told = [message for message in logger.errors if "cudaError 35" not in message]
        raise _refusal(backend, graph, told or logger.errors)
    if settings.timing_cache is not None:
        _write_timings(settings.timing_cache, bytes(config.get_timing_cache().serialize()))
    return Built(
        writer.size,
        writer.digest.hexdigest(),
        [_describe(network.get_input(index)) for index in range(network.num_inputs)],
        [_describe(network.get_output(index)) for index in range(network.num_outputs)],
    )


def _write_timings(cache: Path, content: bytes) -> None:
    """Replace the file by one rename: what a killed build leaves is the older one."""
    cache = Path(os.path.realpath(cache))
    written = cache.with_name(f".{cache.name}.new")
    try:
        written.write_bytes(content)
        written.replace(cache)
    finally:
        written.unlink(missing_ok=True)


def _configure(backend: Backend, config: Any, settings: BuilderSettings) -> None:
    trt = backend.module
    if backend.compute_capabilities:
        known = known_compute_capabilities(trt)
        config.num_compute_capabilities = len(backend.compute_capabilities)
        for index, capability in enumerate(backend.compute_capabilities):
            config.set_compute_capability(known[capability], index)
    if settings.opt_level is not None:
        config.builder_optimization_level = settings.opt_level
    if settings.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
    if settings.timing_cache is not None:
        known_timings = settings.timing_cache.read_bytes() if settings.timing_cache.is_file() else b""
        config.set_timing_cache(config.create_timing_cache(known_timings), ignore_mismatch=False)
    if settings.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if settings.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if settings.strip_weights:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        # Plain REFIT may drop the bias of a product, and Qwen2 has three of them a layer.
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)


def _optimization_profile(builder: Any, network: Any, profile: Profile) -> Any:
    """One sequence; tokens as the profile says, logits for one position, the cache at its only length."""
    made = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        per_token = tensor.name in ("input_ids", "position_ids")

        def shape(length: int, dims: Any = tensor.shape, per_token: bool = per_token) -> list[int]:
            return [
                size if size != -1 else length if per_token and axis == 1 else 1
                for axis, size in enumerate(dims)
            ]

        made.set_shape(tensor.name, shape(profile.least), shape(profile.typical), shape(profile.most))
    return made


def _describe(tensor: Any) -> dict[str, Any]:
    name = str(tensor.dtype).rsplit(".", 1)[-1]
    return {"name": tensor.name, "shape": list(tensor.shape), "dtype": _TYPES.get(name, name.lower())}


def _refusal(backend: Backend, graph: Path, messages: list[str]) -> QconvertError:
    shown = "\n".join(f"  {message}" for message in messages[:5]) or "  (it gave no reason)"
    return QconvertError(
        f"{backend.title} refuses the graph:\n{shown}",
        where=graph,
        hint="update TensorRT and qconvert; if that does not help, report it with these lines",
    )


def _monitor(trt: Any, advance: Callable[..., None]) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Reports TensorRT's progress, and tells it to stop after Ctrl-C."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.cancelled = False

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None: ...

        def step_complete(self, phase: str, step: int) -> bool:
            with suppress(Exception):  # an exception of the progress bar must not reach TensorRT's C++
                advance(1)
            return not self.cancelled

        def phase_finish(self, phase: str) -> None: ...

    return Monitor()


def _writer(trt: Any, output: BinaryIO) -> Any:
    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        """Writes and hashes the plan piece by piece, so that it is never in memory as a whole."""

        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.size = 0
            self.digest = hashlib.sha256()
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                output.write(data)
            except OSError as error:
                self.error = error
                return 0
            self.size += len(data)
            self.digest.update(data)
            return len(data)

    return Writer()
