"""If these fail, the doubles answer to something that NVIDIA's modules do not have, or not in that form."""

from __future__ import annotations

import inspect
import mmap
import re
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qconvert.tensorrt.backends import why_no_gpu
from qrun.backends.trt import cuda
from tests.emulated import cuda_runtime, tensorrt_rtx
from tests.emulated.device import EmulatedDevice
from tests.trt.test_mutations import use_a_plan

without_gpu = pytest.mark.skipif(why_no_gpu() is None, reason="a GPU is there, and would do what is asked")


@pytest.fixture(scope="module")
def real_tensorrt() -> ModuleType:
    return pytest.importorskip(
        "tensorrt_rtx", reason="TensorRT-RTX is not installed (pip install 'qconvert[rtx]')"
    )


@pytest.fixture(scope="module")
def real_cuda() -> ModuleType:
    return pytest.importorskip(
        "cuda.bindings.runtime", reason="cuda-bindings is not installed (pip install 'qconvert[rtx]')"
    )


def own_names(thing: Any, of: str) -> dict[str, Any]:
    """What a double exposes of its own: no private names, and nothing that it imports."""
    return {
        name: value
        for name, value in vars(thing).items()
        if not name.startswith("_")
        and name not in ("MAGIC", "annotations")
        and not inspect.ismodule(value)
        and getattr(value, "__module__", of) == of
    }


def test_every_name_of_the_tensorrt_double_is_tensorrts(real_tensorrt: ModuleType) -> None:
    classes = own_names(tensorrt_rtx, tensorrt_rtx.__name__)
    assert {"Runtime", "ICudaEngine", "IExecutionContext", "ILogger", "DataType"} <= classes.keys()
    lacking = []
    for class_name, double in classes.items():
        real = getattr(real_tensorrt, class_name, None)
        names = own_names(double, double.__module__)
        lacking += [f"{class_name}.{name}" for name in names if not hasattr(real, name)]
        if issubclass(double, Enum):
            for member in double:
                assert real.__members__[member.name].value == member.value, member
        for name, value in names.items():
            if isinstance(value, property) and hasattr(real, name):
                assert not callable(getattr(real, name)), f"{class_name}.{name} is a method"
    assert lacking == []


def test_the_comparison_notices_what_the_real_module_lacks(
    real_tensorrt: ModuleType, real_cuda: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made_up() -> None: ...

    made_up.__module__ = tensorrt_rtx.__name__
    monkeypatch.setattr(tensorrt_rtx.ICudaEngine, "get_tensor_size", made_up, raising=False)
    with pytest.raises(AssertionError, match=r"ICudaEngine\.get_tensor_size"):
        test_every_name_of_the_tensorrt_double_is_tensorrts(real_tensorrt)
    made_up.__module__ = cuda_runtime.__name__
    monkeypatch.setattr(cuda_runtime, "cudaCopy", made_up, raising=False)
    with pytest.raises(AttributeError, match="cudaCopy"):
        test_every_name_of_the_cuda_double_is_cudas(real_cuda)
    signatures = pybind_signatures("f", "f(self: a.B, name: str, shape: a.Dims = None) -> bool")
    assert fits((str,), signatures[0])
    assert not fits((int,), signatures[0])
    assert not fits((str, tuple), signatures[0])
    assert not fits((str, tensorrt_rtx.Dims, int), signatures[0])


def test_sizes_of_elements_are_tensorrts(real_tensorrt: ModuleType) -> None:
    for kind in tensorrt_rtx.DataType:
        real = real_tensorrt.DataType.__members__[kind.name]
        assert (real.itemsize, str(real)) == (kind.itemsize, str(kind))


def test_a_shape_is_read_as_we_read_it(real_tensorrt: ModuleType) -> None:
    assert tuple(real_tensorrt.Dims([1, -1, 64])) == tuple(tensorrt_rtx.Dims([1, -1, 64])) == (1, -1, 64)


def test_every_name_of_the_cuda_double_is_cudas(real_cuda: ModuleType) -> None:
    for name, double in own_names(cuda_runtime, cuda_runtime.__name__).items():
        real = getattr(real_cuda, name)
        if isinstance(double, int):
            assert int(real) == double, name
        elif isinstance(double, type) and issubclass(double, Enum):
            for member in double:
                assert int(getattr(real, member.name)) == member.value, member


def test_the_arguments_that_we_pass_fit_the_real_signatures(
    plan: Path, device: EmulatedDevice, real_tensorrt: ModuleType, real_cuda: ModuleType
) -> None:
    use_a_plan(plan, device)
    stream = cuda.Stream()
    events = cuda.Event(), cuda.Event()
    for event in events:
        event.record(stream)
    events[1].milliseconds_since(events[0])
    for thing in (*events, stream):
        thing.close()
    device.no_gpu = "cudaErrorNoDevice"
    with pytest.raises(cuda.CudaError):
        cuda.open_device()
    assert {
        "IExecutionContext.execute_async_v3",
        "Runtime.__init__",
        "cudaGraphLaunch",
    } <= device.calls.keys()

    functions = {
        name
        for name, value in own_names(cuda_runtime, cuda_runtime.__name__).items()
        if inspect.isfunction(value)
    }
    uncalled = functions - device.calls.keys()
    assert uncalled == set(), "the double has functions that nobody calls"
    for name, calls in device.calls.items():
        owner, _, method = name.rpartition(".")
        if owner:
            doc = getattr(getattr(real_tensorrt, owner), method).__doc__
            overloads = pybind_signatures(method, doc)
            assert overloads, f"{name} has no signature: {doc}"
            for types in calls:
                assert any(fits(types, overload) for overload in overloads), f"{name}{types}: {overloads}"
        else:
            first_line = getattr(real_cuda, name).__doc__.splitlines()[0]
            wanted = re.fullmatch(rf"{name}\((.*)\)", first_line)
            assert wanted, first_line
            count = len([part for part in wanted[1].split(",") if part.strip()])
            assert {len(types) for types in calls} == {count}, f"{name}: {first_line}"


@without_gpu
def test_cudas_real_functions_take_our_types(
    plan: Path, device: EmulatedDevice, real_cuda: ModuleType
) -> None:
    """They refuse for want of a driver, which is after they have taken the arguments apart."""
    use_a_plan(plan, device)
    handles = {"stream": "cudaStream_t", "graph": "cudaGraph_t", "graphExec": "cudaGraphExec_t"}
    for name, calls in device.calls.items():
        if name.startswith("cuda"):
            function = getattr(real_cuda, name)
            listed = re.findall(r"\((.*)\)", function.__doc__)[0]
            parameters = [part.split(":")[0].split()[-1] for part in listed.split(",") if part.strip()]
            for types in calls:
                arguments = [
                    getattr(real_cuda, handles[parameter])()
                    if parameter in handles
                    else of_kind(real_cuda, kind)
                    for parameter, kind in zip(parameters, types)
                ]
                status = function(*arguments)[0]
                assert status.name in ("cudaErrorInsufficientDriver", "cudaErrorNoDevice", "cudaSuccess"), (
                    name
                )


@without_gpu
def test_a_machine_without_a_gpu_is_told_by_the_real_cuda(real_cuda: ModuleType) -> None:
    with pytest.raises(cuda.CudaError, match="this machine has no NVIDIA GPU that can be used"):
        cuda.open_device()


def of_kind(real_cuda: ModuleType, kind: type) -> Any:
    """A number, or a member of the real enumeration."""
    if issubclass(kind, Enum):
        return getattr(getattr(real_cuda, kind.__name__), next(iter(kind)).name)
    return kind(0)


def pybind_signatures(method: str, doc: str) -> list[list[tuple[str, str, bool]]]:
    """Each overload as its parameters after ``self``: name, type, and whether it has a default."""
    found = []
    for line in doc.splitlines():
        match = re.match(rf"(?:\d+\. )?{method}\(self: [\w.]+(?:, )?(.*)\) -> ", line)
        if match:
            parts = re.split(r", (?=\w+: )", match[1]) if match[1] else []
            parameters = [re.fullmatch(r"(\w+): ([^=]+?)(?: = (.*))?", part) for part in parts]
            found.append([(each[1], each[2], each[3] is not None) for each in parameters if each])
    return found


def fits(types: tuple[type, ...], parameters: list[tuple[str, str, bool]]) -> bool:
    required = [each for each in parameters if not each[2]]
    if not len(required) <= len(types) <= len(parameters):
        return False
    return all(accepts(wanted, given) for (_, wanted, _), given in zip(parameters, types))


def accepts(wanted: str, given: type) -> bool:
    if wanted == "typing.SupportsInt":
        return hasattr(given, "__index__")
    if wanted == "typing_extensions.Buffer":
        return given in (bytes, memoryview, mmap.mmap)
    return wanted.rsplit(".", 1)[-1] in {each.__name__ for each in given.__mro__}
