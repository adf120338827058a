"""The part of CUDA that a session needs: device and page-locked memory, one stream, graphs.

A thin layer over ``cuda.bindings.runtime`` (package cuda-bindings). Every return code is checked. Whoever
makes a buffer, a stream or a graph must close it; closing it twice does no harm.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from qrun.backends.trt.gpu import why_no_gpu
from qrun.errors import QrunError

_NO_GPU = ("cudaErrorNoDevice", "cudaErrorInsufficientDriver", "cudaErrorStubLibrary")
_INSTALL = "pip install 'qconvert[rtx]' or 'qconvert[tensorrt]', as the plan's sidecar names its backend"


class CudaError(QrunError):
    """A call to CUDA that failed.

    Attributes:
        name: CUDA's own, such as "cudaErrorMemoryAllocation".
    """

    def __init__(self, name: str, what: str, hint: str | None = None) -> None:
        self.name = name
        super().__init__(what, hint=hint)


def bindings() -> Any:
    """The module ``cuda.bindings.runtime``.

    Raises:
        QrunError: it is not installed.
    """
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise QrunError(f"the package cuda-bindings is missing: {error}", hint=_INSTALL) from error


def call(function: str, *arguments: Any) -> Any:
    """Call a function of CUDA's runtime and return its result (a tuple of several, None for none).

    Raises:
        CudaError: what CUDA returned, by its name.
    """
    runtime = bindings()
    status, *values = getattr(runtime, function)(*arguments)
    if status != runtime.cudaError_t.cudaSuccess:
        raise _error(runtime, function, status)
    return values[0] if len(values) == 1 else tuple(values) or None


def _error(runtime: Any, function: str, status: Any) -> CudaError:
    name, words = (
        text.decode() if isinstance(text, bytes) else f"CUDA error {int(status)}"
        for _, text in (runtime.cudaGetErrorName(status), runtime.cudaGetErrorString(status))
    )
    if name in _NO_GPU:
        # On a machine without any driver CUDA says that the driver is too old.
        words = why_no_gpu() or words
        return CudaError(
            name,
            f"this machine has no NVIDIA GPU that can be used: {words} ({name})",
            "run the plan on a machine with a GPU and its driver; the folder itself runs here on the CPU",
        )
    hint = {
        "cudaErrorMemoryAllocation": "close other programs on the GPU, or export with a shorter --max-length",
    }.get(name, "update the NVIDIA driver; if that does not help, report it with these lines")
    return CudaError(name, f"{function} failed: {words} ({name})", hint)


@dataclass(frozen=True)
class Device:
    """The GPU that this process uses; memory in bytes."""

    index: int
    name: str
    compute_capability: str
    total_bytes: int

    def free_bytes(self) -> int:
        """Memory that can still be allocated."""
        return int(call("cudaMemGetInfo")[0])


def open_device() -> Device:
    """The current GPU: the first that CUDA_VISIBLE_DEVICES leaves.

    Raises:
        CudaError: there is no GPU or no driver.
        QrunError: cuda-bindings is not installed.
    """
    index = int(call("cudaGetDevice"))
    attributes = bindings().cudaDeviceAttr
    major, minor = (
        call("cudaDeviceGetAttribute", attribute, index)
        for attribute in (
            attributes.cudaDevAttrComputeCapabilityMajor,
            attributes.cudaDevAttrComputeCapabilityMinor,
        )
    )
    name = call("cudaGetDeviceProperties", index).name
    return Device(index, name.decode().rstrip("\0"), f"{major}.{minor}", int(call("cudaMemGetInfo")[1]))


class _Closeable:
    """An object of CUDA's that is freed once, by ``close``."""

    def __init__(self, release: str, handle: Any) -> None:
        self._release = release
        self._handle: Any = handle

    def close(self) -> None:
        if self._handle is not None:
            handle, self._handle = self._handle, None
            call(self._release, handle)


class DeviceBuffer(_Closeable):
    """``nbytes`` of the GPU's memory, at ``address``; uninitialised."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        super().__init__("cudaFree", call("cudaMalloc", nbytes))

    @property
    def address(self) -> int:
        assert self._handle is not None, "the buffer is closed"
        return int(self._handle)


class HostBuffer(_Closeable):
    """A page-locked array, which the GPU copies from and to while Python goes on. ``close`` frees it."""

    def __init__(self, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        kind = np.dtype(dtype)
        self.nbytes = int(np.prod(shape)) * kind.itemsize
        super().__init__("cudaFreeHost", call("cudaMallocHost", self.nbytes))
        memory = (ctypes.c_byte * self.nbytes).from_address(int(self._handle))
        self.array: NDArray[Any] = np.frombuffer(memoryview(memory), dtype=kind).reshape(shape)

    @property
    def address(self) -> int:
        assert self._handle is not None, "the buffer is closed"
        return int(self._handle)

    def close(self) -> None:
        self.array = np.empty(0, dtype=self.array.dtype)
        super().close()


class Stream(_Closeable):
    """A queue of work for the GPU; nothing on it is done before ``synchronize`` returns."""

    def __init__(self) -> None:
        super().__init__(
            "cudaStreamDestroy", call("cudaStreamCreateWithFlags", bindings().cudaStreamNonBlocking)
        )

    @property
    def handle(self) -> int:
        """The address that TensorRT wants."""
        assert self._handle is not None, "the stream is closed"
        return int(self._handle)

    def to_device(self, target: DeviceBuffer, source: HostBuffer, nbytes: int) -> None:
        self._copy(target, source, nbytes, bindings().cudaMemcpyKind.cudaMemcpyHostToDevice)

    def to_host(self, target: HostBuffer, source: DeviceBuffer, nbytes: int) -> None:
        self._copy(target, source, nbytes, bindings().cudaMemcpyKind.cudaMemcpyDeviceToHost)

    def zero(self, target: DeviceBuffer) -> None:
        call("cudaMemsetAsync", target.address, 0, target.nbytes, self._handle)

    def synchronize(self) -> None:
        """Wait until all work so far is done."""
        call("cudaStreamSynchronize", self._handle)

    def capture(self, enqueue: Callable[[], None]) -> Graph:
        """Record what ``enqueue`` puts on the stream, without doing it.

        Raises:
            QrunError: something of it cannot be captured; the stream goes on as before.
        """
        with self._capturing() as recorded:
            enqueue()
        try:
            return Graph(call("cudaGraphInstantiate", recorded[0], 0))
        finally:
            call("cudaGraphDestroy", recorded[0])

    @contextmanager
    def _capturing(self) -> Iterator[list[Any]]:
        # Thread-local, so that other threads may allocate memory meanwhile.
        mode = bindings().cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        call("cudaStreamBeginCapture", self._handle, mode)
        recorded: list[Any] = []
        try:
            yield recorded
        except BaseException:
            # The capture must be ended after an error too; what it recorded is thrown away.
            runtime = bindings()
            _, graph = runtime.cudaStreamEndCapture(self._handle)
            if graph is not None and int(graph):
                runtime.cudaGraphDestroy(graph)
            raise
        recorded.append(call("cudaStreamEndCapture", self._handle))

    def _copy(
        self, target: DeviceBuffer | HostBuffer, source: DeviceBuffer | HostBuffer, nbytes: int, kind: Any
    ) -> None:
        assert nbytes <= min(target.nbytes, source.nbytes), "a copy beyond a buffer"
        call("cudaMemcpyAsync", target.address, source.address, nbytes, kind, self._handle)


class Graph(_Closeable):
    """Recorded work that is queued again by one call, at the same addresses."""

    def __init__(self, handle: Any) -> None:
        super().__init__("cudaGraphExecDestroy", handle)

    def launch(self, stream: Stream) -> None:
        call("cudaGraphLaunch", self._handle, stream._handle)


class Event(_Closeable):
    """A mark on a stream, for times as the GPU sees them."""

    def __init__(self) -> None:
        super().__init__("cudaEventDestroy", call("cudaEventCreateWithFlags", bindings().cudaEventDefault))

    def record(self, stream: Stream) -> None:
        call("cudaEventRecord", self._handle, stream._handle)

    def milliseconds_since(self, earlier: Event) -> float:
        """Waits for this event; the earlier one must have been recorded on the same stream."""
        call("cudaEventSynchronize", self._handle)
        return float(call("cudaEventElapsedTime", earlier._handle, self._handle))
