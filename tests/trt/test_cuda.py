"""If these fail, an error of CUDA is lost or shows as a traceback, or its memory is lost on the way."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from qrun.backends.trt import cuda
from qrun.errors import QrunError
from tests.emulated.device import EmulatedDevice


def test_without_the_package_it_says_which_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(QrunError, match=r"the package cuda-bindings is missing(?s:.*)pip install"):
        cuda.open_device()


def test_the_gpu_is_described(device: EmulatedDevice) -> None:
    gpu = cuda.open_device()
    assert gpu == cuda.Device(0, "Emulated GPU", "8.9", 8 << 30)
    buffer = cuda.DeviceBuffer(1 << 20)
    assert gpu.free_bytes() == (8 << 30) - (1 << 20)
    buffer.close()
    buffer.close()  # twice does no harm
    assert gpu.free_bytes() == 8 << 30


def test_a_failed_call_is_told_by_cudas_own_name(device: EmulatedDevice) -> None:
    with pytest.raises(cuda.CudaError, match=r"cudaMalloc failed: out of memory \(cudaErrorMemory") as raised:
        cuda.DeviceBuffer(1 << 40)
    assert raised.value.name == "cudaErrorMemoryAllocation"
    assert raised.value.hint is not None
    assert "--max-length" in raised.value.hint


def test_an_array_goes_to_the_gpu_and_comes_back(device: EmulatedDevice) -> None:
    stream, buffer = cuda.Stream(), cuda.DeviceBuffer(24)
    there, back = cuda.HostBuffer((3,), np.int64), cuda.HostBuffer((3,), np.int64)
    there.array[...] = [1, 2, 3]
    stream.to_device(buffer, there, 24)
    stream.to_host(back, buffer, 24)
    assert back.array.tolist() != [1, 2, 3]  # nothing has been waited for
    stream.synchronize()
    assert back.array.tolist() == [1, 2, 3]
    for thing in (there, back, buffer, stream):
        thing.close()
    assert back.array.size == 0  # the memory behind it is gone


def test_a_graph_does_its_work_again_with_what_the_array_holds_then(device: EmulatedDevice) -> None:
    stream, buffer = cuda.Stream(), cuda.DeviceBuffer(8)
    there, back = cuda.HostBuffer((1,), np.int64), cuda.HostBuffer((1,), np.int64)

    def enqueue() -> None:
        stream.to_device(buffer, there, 8)
        stream.to_host(back, buffer, 8)

    graph = stream.capture(enqueue)
    for number in (5, 6):
        there.array[0] = number
        graph.launch(stream)
        stream.synchronize()
        assert back.array[0] == number
    for thing in (graph, there, back, buffer, stream):
        thing.close()


def test_an_error_inside_a_capture_ends_it(device: EmulatedDevice) -> None:
    """A stream left in capture would refuse all work from then on."""
    stream, buffer = cuda.Stream(), cuda.DeviceBuffer(8)

    def enqueue() -> None:
        stream.zero(buffer)
        raise QrunError("TensorRT cannot")

    with pytest.raises(QrunError, match="TensorRT cannot"):
        stream.capture(enqueue)
    device.breaks_captures = True
    with pytest.raises(cuda.CudaError, match="cudaStreamEndCapture failed"):
        stream.capture(lambda: stream.zero(buffer))
    stream.zero(buffer)
    stream.synchronize()
    buffer.close()
    stream.close()
