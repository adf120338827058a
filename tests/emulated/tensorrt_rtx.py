"""The double of TensorRT: the classes that qrun uses, executing a folder's standard graph by ONNX Runtime.

What NVIDIA's library answers with False, with wrong numbers or with a crash is a ``Violation`` here.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from enum import Enum
from math import prod
from pathlib import Path
from typing import Any

from tests.emulated.device import EmulatedDevice, EmulatedStream, Piece, Work, current, recorded
from tests.emulated.graph import StandardGraph
from tests.emulated.rules import Rule

__version__ = "1.7.1.116"
# The first bytes of an emulated plan; JSON follows: the folder, and the profiles as in the sidecar.
MAGIC = b"EMULATED PLAN\n"


class DataType(Enum):
    FLOAT = 0
    HALF = 1
    INT32 = 3
    BF16 = 7
    INT64 = 8

    @property
    def itemsize(self) -> int:
        return {"FLOAT": 4, "HALF": 2, "INT32": 4, "BF16": 2, "INT64": 8}[self.name]


class TensorIOMode(Enum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class TensorLocation(Enum):
    DEVICE = 0
    HOST = 1


class ExecutionContextAllocationStrategy(Enum):
    STATIC = 0
    ON_PROFILE_CHANGE = 1


class Dims:
    """A shape as TensorRT gives it: a sequence, and no tuple."""

    def __init__(self, shape: Any = ()) -> None:
        self._shape = tuple(shape)

    def __len__(self) -> int:
        return len(self._shape)

    def __getitem__(self, index: int) -> int:
        return self._shape[index]


class ILogger:
    class Severity(Enum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2
        INFO = 3
        VERBOSE = 4

    INTERNAL_ERROR = Severity.INTERNAL_ERROR
    ERROR = Severity.ERROR
    WARNING = Severity.WARNING
    INFO = Severity.INFO
    VERBOSE = Severity.VERBOSE

    def log(self, severity: ILogger.Severity, msg: str) -> None:
        raise NotImplementedError("TensorRT calls the subclass")


class Runtime:
    @recorded
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    @recorded
    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
        content = bytes(serialized_engine)
        if not content.startswith(MAGIC):
            self._logger.log(
                ILogger.ERROR, "Serialization assertion stdVersionRead == kSERIALIZATION_VERSION failed."
            )
            return None
        return ICudaEngine._of(json.loads(content.removeprefix(MAGIC)), self._logger)


class ICudaEngine:
    @classmethod
    def _of(cls, plan: dict[str, Any], logger: ILogger) -> ICudaEngine:
        engine = cls()
        engine._logger = logger
        engine._graph = StandardGraph(Path(plan["folder"]) / "model.standard.onnx")
        engine._lengths = [(each["least"], each["typical"], each["most"]) for each in plan["profiles"]]
        engine._positions = plan.get("positions", 1)
        engine._scratch = plan.get("scratch", 1 << 16)
        current().held[engine] = plan.get("weights", 1 << 16)
        return engine

    @property
    def num_io_tensors(self) -> int:
        return len(self._graph.tensors)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._lengths)

    @recorded
    def get_tensor_name(self, index: int) -> str:
        return list(self._graph.tensors)[index]

    @recorded
    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self._graph.inputs else TensorIOMode.OUTPUT

    @recorded
    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[self._graph.tensors[name].kind]

    @recorded
    def get_tensor_shape(self, name: str) -> Dims:
        return Dims(self._graph.tensors[name].shape)

    @recorded
    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.DEVICE

    @recorded
    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Dims]:
        shapes = []
        for length in self._lengths[profile_index]:
            positions = 1 if length == self._lengths[profile_index][0] else min(self._positions, length)
            free = {"input_ids": [1, length], "position_ids": [1, length], "logits_positions": [positions]}
            shapes.append(Dims(free.get(name, (1, *self._graph.tensors[name].shape[1:]))))
        return shapes

    @recorded
    def get_aliased_input_tensor(self, name: str) -> str | None:
        return name.replace("present", "past_key_values") if name.startswith("present.") else None

    @recorded
    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return int(self._scratch)

    @recorded
    def create_execution_context(
        self, strategy: ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy.STATIC
    ) -> IExecutionContext | None:
        if self._scratch > current().free_bytes():
            self._logger.log(
                ILogger.ERROR, "[defaultAllocator.cpp] Requested amount of GPU memory could not be allocated."
            )
            return None
        return IExecutionContext._of(self)


class IExecutionContext:
    @classmethod
    def _of(cls, engine: ICudaEngine) -> IExecutionContext:
        context = cls()
        context._engine = weakref.ref(engine, _outlived(weakref.ref(context)))
        context._graph, context._logger = engine._graph, engine._logger
        context._profile = None
        context._shapes = {}
        context._addresses = {}
        context._warm = False
        current().held[context] = engine._scratch
        return context

    @recorded
    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        current().stream(stream_handle)
        self._profile = profile_index
        self._shapes.clear()
        self._warm = False
        return 0 <= profile_index < self._engine().num_optimization_profiles

    @recorded
    def set_input_shape(self, name: str, shape: Any) -> bool:
        device = current()
        if self._profile is None:
            device.fail(Rule.PROFILE_UNSET, name)
        least, _, most = self._engine().get_tensor_profile_shape(name, self._profile)
        if len(shape) != len(least) or not all(a <= b <= c for a, b, c in zip(least, shape, most)):
            device.fail(
                Rule.OUTSIDE_PROFILE, f"{name} {tuple(shape)} not within {tuple(least)} and {tuple(most)}"
            )
        self._shapes[name] = tuple(shape)
        self._warm = False
        return True

    @recorded
    def infer_shapes(self) -> list[str]:
        return [name for name in self._graph.inputs if name not in self._shapes]

    @recorded
    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert name in self._graph.tensors, name
        self._addresses[name] = memory
        return True

    @recorded
    def is_stream_capturable(self, stream: int) -> bool:
        current().stream(stream)
        return current().capturable

    @recorded
    def execute_async_v3(self, stream_handle: int) -> bool:
        device = current()
        stream = device.stream(stream_handle)
        if device.refuses_runs is not None:
            self._logger.log(ILogger.ERROR, device.refuses_runs)
            return False
        if self._engine() is None:
            device.fail(Rule.ENGINE_GONE, "execute_async_v3")
        work = self._checked(device, stream)
        device.enqueue(stream, work)
        self._warm = True
        return True

    def _checked(self, device: EmulatedDevice, stream: EmulatedStream) -> Work:
        if self._profile is None:
            device.fail(Rule.PROFILE_UNSET, "execute_async_v3")
        if unset := self.infer_shapes():
            device.fail(Rule.SHAPE_UNSET, ", ".join(unset))
        if unset := [name for name in self._graph.tensors if not self._addresses.get(name)]:
            device.fail(Rule.ADDRESS_UNSET, ", ".join(unset))
        if stream.capture is not None and not self._warm:
            device.fail(Rule.CAPTURE_COLD, f"shapes {self._shapes}")
        shapes = self._graph.shapes(self._shapes)
        places = {}
        for name, tensor in self._graph.tensors.items():
            nbytes = prod(shapes[name]) * DataType[tensor.kind].itemsize
            places[name] = device.piece(self._addresses[name], nbytes, too_short=Rule.TOO_SMALL)
        for name in self._graph.outputs:
            given = ICudaEngine.get_aliased_input_tensor(self._engine(), name)
            if given is not None and self._addresses[given] != self._addresses[name]:
                device.fail(Rule.UNALIASED, name)
        return _Run(self, self._graph, shapes, places)


class _Run(Work):
    """One pass through the graph, with the addresses and shapes of the moment when it was queued."""

    def __init__(
        self,
        context: IExecutionContext,
        graph: StandardGraph,
        shapes: dict[str, tuple[int, ...]],
        places: dict[str, Piece],
    ) -> None:
        super().__init__(list(places.values()))
        self._context = weakref.ref(context)
        self._graph = graph
        self._shapes = shapes
        self._places = places

    def run(self, device: EmulatedDevice) -> None:
        if self._context() is None:
            device.fail(Rule.CONTEXT_GONE, "its work was still queued, or in a graph")
        for name in self._graph.inputs:
            if not self._places[name].written.all():
                device.fail(Rule.UNINITIALISED, name)
        self._graph.run({name: place.bytes for name, place in self._places.items()}, self._shapes)
        for name in self._graph.outputs:
            self._places[name].written[...] = True
        device.runs += 1


def _outlived(context: Callable[[], IExecutionContext | None]) -> Callable[[Any], None]:
    def check(_: Any) -> None:
        if context() is not None:
            current().fail(Rule.ENGINE_GONE, "the engine was given back first")

    return check
