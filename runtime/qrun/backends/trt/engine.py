"""A TensorRT engine: the plan, deserialised, and compared with what its sidecar says of it."""

from __future__ import annotations

import mmap
from typing import Any

from qrun.backends.trt.cuda import Stream
from qrun.backends.trt.log import error_log
from qrun.errors import QrunError
from qrun.folder.plan import PlanFacts, Tensor

TOKEN_INPUTS = ("input_ids", "position_ids")
POSITIONS_INPUT = "logits_positions"
LOGITS_OUTPUT = "logits"
_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64", "INT32": "int32"}


class Engine:
    """The plan on the GPU; both of NVIDIA's modules have the same calls.

    Attributes:
        facts: the sidecar's, which the engine agrees with.
        caches: each past_key_values input, and the present output that is written to the same memory.

    Raises:
        QrunError: TensorRT cannot open the plan, or it is not what the sidecar says.
    """

    def __init__(self, facts: PlanFacts, module: Any) -> None:
        self.facts = facts
        self._module = module
        self._logger = error_log(module)
        self._runtime = module.Runtime(self._logger)
        with (
            facts.path.open("rb") as file,
            # Mapped, so that a plan of gigabytes is not copied into this process's memory first.
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            self._engine = self._runtime.deserialize_cuda_engine(content)
        if self._engine is None:
            raise self.refusal("cannot open the plan")
        try:
            self._check_tensors()
            self.caches = self._check_aliases()
            self._check_profiles()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the weights back; contexts must be gone before."""
        self._engine = None
        self._runtime = None

    def new_context(self, profile: int, stream: Stream) -> Any:
        """An execution context on one optimisation profile, with scratch memory for that profile alone."""
        strategy = self._module.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        context = self._engine.create_execution_context(strategy)
        if context is None:
            raise self.refusal("cannot make an execution context")
        self.check(context.set_optimization_profile_async(profile, stream.handle), "select a profile")
        stream.synchronize()
        return context

    def most(self, name: str, profile: int) -> tuple[int, ...]:
        """The largest shape that a profile allows for an input."""
        return tuple(self._engine.get_tensor_profile_shape(name, profile)[2])

    def item_size(self, name: str) -> int:
        """Bytes of an element. (TensorRT's own ``nptype`` knows no bfloat16.)"""
        return int(self._engine.get_tensor_dtype(name).itemsize)

    def cache_shape(self, name: str) -> tuple[int, ...]:
        """A past_key_values input for one sequence: [1, kv_heads, length, head_size]."""
        return (1, *tuple(self._engine.get_tensor_shape(name))[1:])

    def scratch_bytes(self, profile: int) -> int:
        """What an execution context on this profile takes of the GPU's memory."""
        return int(self._engine.get_device_memory_size_for_profile_v2(profile))

    def check(self, done: bool, doing: str) -> None:
        """Raise what TensorRT logged where a call of it returned False."""
        if not done:
            raise self.refusal(f"could not {doing}")

    def refusal(self, what: str) -> QrunError:
        told = "\n".join(f"  {message}" for message in self._logger.errors[-5:]) or "  (it gave no reason)"
        self._logger.errors.clear()
        return QrunError(
            f"{self.facts.title} {what}:\n{told}",
            where=self.facts.path,
            hint="check the free memory of the GPU (nvidia-smi) and its driver, or build the plan again: "
            f"{self.facts.build_again}",
        )

    def _check_tensors(self) -> None:
        modes = self._module.TensorIOMode
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        for mode, told in ((modes.INPUT, self.facts.inputs), (modes.OUTPUT, self.facts.outputs)):
            found = {name for name in names if self._engine.get_tensor_mode(name) == mode}
            different = found ^ {tensor.name for tensor in told}
            different |= {tensor.name for tensor in told if tensor.name in found and not self._agrees(tensor)}
            if different:
                raise self._not_as_told(f"its {', '.join(sorted(different))} differ")
        on_host = [
            name
            for name in names
            if self._engine.get_tensor_location(name) != self._module.TensorLocation.DEVICE
        ]
        if on_host:
            raise self._not_as_told(f"it wants {', '.join(on_host)} in the CPU's memory")

    def _check_aliases(self) -> dict[str, str]:
        """The sidecar's aliases by their inputs, each of them confirmed by the engine."""
        for output, given in self.facts.aliases.items():
            if self._engine.get_aliased_input_tensor(output) != given:
                raise self._not_as_told(f"it does not write {output} where {given} lies")
        caches = {given: output for output, given in self.facts.aliases.items()}
        known = {*caches, *TOKEN_INPUTS, POSITIONS_INPUT}
        if strangers := {tensor.name for tensor in self.facts.inputs} ^ known:
            raise self._not_as_told(f"its inputs are not a decoder's: {', '.join(sorted(strangers))}")
        return caches

    def _check_profiles(self) -> None:
        told = [(1, 1, profile.least, profile.most) for profile in self.facts.profiles]
        found = []
        for index in range(self._engine.num_optimization_profiles):
            least, _, most = (
                tuple(shape) for shape in self._engine.get_tensor_profile_shape(TOKEN_INPUTS[0], index)
            )
            found.append((least[0], most[0], least[1], most[1]))
        if found != told:
            raise self._not_as_told("its optimisation profiles differ")

    def _agrees(self, tensor: Tensor) -> bool:
        """Type and shape, where -1 on either side is a size that is told at run time."""
        kind = str(self._engine.get_tensor_dtype(tensor.name)).rsplit(".", 1)[-1]
        shape = tuple(self._engine.get_tensor_shape(tensor.name))
        return (
            _DTYPES.get(kind) == tensor.dtype
            and len(shape) == len(tensor.shape)
            and all(size == told or -1 in (size, told) for size, told in zip(shape, tensor.shape))
        )

    def _not_as_told(self, how: str) -> QrunError:
        return QrunError(
            f"{self.facts.path.name} is not what its sidecar says: {how}",
            where=self.facts.path,
            hint=f"build it again: {self.facts.build_again}",
        )
