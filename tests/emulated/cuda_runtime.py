"""The double of ``cuda.bindings.runtime``: the functions that qrun calls, with the real names and codes."""

from __future__ import annotations

from enum import IntEnum
from types import SimpleNamespace
from typing import Any

from tests.emulated.device import Copy, EmulatedDevice, EmulatedStream, Fill, Work, current, recorded
from tests.emulated.rules import Rule

cudaEventDefault = 0
cudaStreamNonBlocking = 1


class cudaError_t(IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorStreamCaptureInvalidated = 901


class cudaMemcpyKind(IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class cudaStreamCaptureMode(IntEnum):
    cudaStreamCaptureModeThreadLocal = 1


class cudaDeviceAttr(IntEnum):
    cudaDevAttrComputeCapabilityMajor = 75
    cudaDevAttrComputeCapabilityMinor = 76


_WORDS = {
    cudaError_t.cudaSuccess: b"no error",
    cudaError_t.cudaErrorMemoryAllocation: b"out of memory",
    cudaError_t.cudaErrorInsufficientDriver: b"CUDA driver version is insufficient for CUDA runtime version",
    cudaError_t.cudaErrorNoDevice: b"no CUDA-capable device is detected",
    cudaError_t.cudaErrorStreamCaptureInvalidated: b"operation failed due to a previous error during capture",
}
_OK = cudaError_t.cudaSuccess


class _Handle:
    """As the real ones: an object that is an address."""

    def __init__(self, value: int) -> None:
        self._value = value

    def __int__(self) -> int:
        return self._value


class _Graph:
    def __init__(self, work: list[Work]) -> None:
        self.work = work


class _GraphExec(_Graph):
    """What a graph becomes when it is made ready to launch."""


class _Event:
    pass


@recorded
def cudaGetErrorName(error: cudaError_t) -> tuple[cudaError_t, bytes]:
    return _OK, error.name.encode()


@recorded
def cudaGetErrorString(error: cudaError_t) -> tuple[cudaError_t, bytes]:
    return _OK, _WORDS[error]


@recorded
def cudaGetDevice() -> tuple[cudaError_t, int | None]:
    refusal = current().no_gpu
    return (cudaError_t[refusal], None) if refusal else (_OK, 0)


@recorded
def cudaDeviceGetAttribute(attr: cudaDeviceAttr, device: int) -> tuple[cudaError_t, int]:
    major, minor = current().compute_capability
    return _OK, major if attr == cudaDeviceAttr.cudaDevAttrComputeCapabilityMajor else minor


@recorded
def cudaGetDeviceProperties(device: int) -> tuple[cudaError_t, Any]:
    return _OK, SimpleNamespace(name=current().name.encode())


@recorded
def cudaMemGetInfo() -> tuple[cudaError_t, int, int]:
    return _OK, current().free_bytes(), current().total_bytes


@recorded
def cudaMalloc(size: int) -> tuple[cudaError_t, int | None]:
    if size > current().free_bytes():
        return cudaError_t.cudaErrorMemoryAllocation, None
    return _OK, current().allocate(size)


@recorded
def cudaMallocHost(size: int) -> tuple[cudaError_t, int]:
    return _OK, current().allocate_host(size)


@recorded
def cudaFree(devPtr: int) -> tuple[cudaError_t]:
    current().release(int(devPtr))
    return (_OK,)


@recorded
def cudaFreeHost(ptr: int) -> tuple[cudaError_t]:
    current().release(int(ptr))
    return (_OK,)


@recorded
def cudaMemcpyAsync(dst: int, src: int, count: int, kind: cudaMemcpyKind, stream: Any) -> tuple[cudaError_t]:
    device = current()
    queue = device.stream(stream)
    to_host = kind == cudaMemcpyKind.cudaMemcpyDeviceToHost
    target = (device.host_piece if to_host else device.piece)(dst, count)
    source = (device.piece if to_host else device.host_piece)(src, count)
    device.enqueue(queue, Copy(target, source))
    return (_OK,)


@recorded
def cudaMemsetAsync(devPtr: int, value: int, count: int, stream: Any) -> tuple[cudaError_t]:
    device = current()
    device.enqueue(device.stream(stream), Fill(device.piece(devPtr, count), value))
    return (_OK,)


@recorded
def cudaStreamCreateWithFlags(flags: int) -> tuple[cudaError_t, _Handle]:
    return _OK, _Handle(current().add_handle(EmulatedStream()))


@recorded
def cudaStreamSynchronize(stream: Any) -> tuple[cudaError_t]:
    current().synchronize(current().stream(stream))
    return (_OK,)


@recorded
def cudaStreamDestroy(stream: Any) -> tuple[cudaError_t]:
    if current().stream(stream).queue:
        current().fail(Rule.FREED_IN_FLIGHT, "a stream with work on it")
    return _destroy(stream, EmulatedStream)


@recorded
def cudaStreamBeginCapture(stream: Any, mode: cudaStreamCaptureMode) -> tuple[cudaError_t]:
    current().stream(stream).capture = []
    return (_OK,)


@recorded
def cudaStreamEndCapture(stream: Any) -> tuple[cudaError_t, _Handle | None]:
    queue = current().stream(stream)
    work, queue.capture = queue.capture, None
    if current().breaks_captures:
        return cudaError_t.cudaErrorStreamCaptureInvalidated, None
    return _OK, _Handle(current().add_handle(_Graph(work)))


@recorded
def cudaGraphInstantiate(graph: Any, flags: int) -> tuple[cudaError_t, _Handle]:
    return _OK, _Handle(current().add_handle(_GraphExec(current().handle(graph, _Graph).work)))


@recorded
def cudaGraphDestroy(graph: Any) -> tuple[cudaError_t]:
    return _destroy(graph, _Graph)


@recorded
def cudaGraphExecDestroy(graphExec: Any) -> tuple[cudaError_t]:
    return _destroy(graphExec, _GraphExec)


@recorded
def cudaGraphLaunch(graphExec: Any, stream: Any) -> tuple[cudaError_t]:
    device = current()
    queue = device.stream(stream)
    for work in device.handle(graphExec, _GraphExec).work:
        device.enqueue(queue, work)
    device.graph_launches += 1
    return (_OK,)


@recorded
def cudaEventCreateWithFlags(flags: int) -> tuple[cudaError_t, _Handle]:
    return _OK, _Handle(current().add_handle(_Event()))


@recorded
def cudaEventRecord(event: Any, stream: Any) -> tuple[cudaError_t]:
    device = current()
    device.handle(event, _Event).stream = device.stream(stream)
    return (_OK,)


@recorded
def cudaEventSynchronize(event: Any) -> tuple[cudaError_t]:
    device = current()
    device.synchronize(device.handle(event, _Event).stream)
    return (_OK,)


@recorded
def cudaEventElapsedTime(start: Any, end: Any) -> tuple[cudaError_t, float]:
    for event in (start, end):
        current().handle(event, _Event)
    return _OK, 1.0


@recorded
def cudaEventDestroy(event: Any) -> tuple[cudaError_t]:
    return _destroy(event, _Event)


def _destroy(handle: Any, kind: type) -> tuple[cudaError_t]:
    device: EmulatedDevice = current()
    device.handle(handle, kind)
    del device.handles[int(handle)]
    return (_OK,)
