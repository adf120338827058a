"""A folder's graph in standard operators, run over memory that somebody else owns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

_KINDS = {
    "tensor(float)": "FLOAT",
    "tensor(float16)": "HALF",
    "tensor(bfloat16)": "BF16",
    "tensor(int64)": "INT64",
    "tensor(int32)": "INT32",
}
_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "uint16", "INT64": "int64", "INT32": "int32"}
_BFLOAT16 = 16  # TensorProto's element type, for what NumPy cannot say


@dataclass(frozen=True)
class GraphTensor:
    """An input or output; ``kind`` is TensorRT's name of its type, -1 a size that is told at run time."""

    kind: str
    shape: tuple[int, ...]
    names: tuple[int | str, ...]


class StandardGraph:
    """``model.standard.onnx`` on ONNX Runtime's CPU provider.

    Attributes:
        inputs, outputs: names in the graph's order.
        tensors: both of them.
    """

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 2
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        given, made = self._session.get_inputs(), self._session.get_outputs()
        self.inputs = [each.name for each in given]
        self.outputs = [each.name for each in made]
        self.tensors = {
            each.name: GraphTensor(
                _KINDS[each.type],
                tuple(size if isinstance(size, int) else -1 for size in each.shape),
                tuple(each.shape),
            )
            for each in [*given, *made]
        }

    def shapes(self, of_inputs: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors, given those of the inputs."""
        sizes: dict[int | str, int] = {}
        for name, shape in of_inputs.items():
            sizes |= dict(zip(self.tensors[name].names, shape))
        return {
            name: tuple(sizes.get(size, size) for size in tensor.names)  # type: ignore[misc]
            for name, tensor in self.tensors.items()
        }

    def run(self, memory: dict[str, NDArray[np.uint8]], shapes: dict[str, tuple[int, ...]]) -> None:
        """Compute; every output is written where its memory lies, past and present in one place."""
        binding = self._session.io_binding()
        for name in self.inputs:
            binding.bind_ortvalue_input(name, self._value(name, memory, shapes))
        for name in self.outputs:
            binding.bind_ortvalue_output(name, self._value(name, memory, shapes))
        self._session.run_with_iobinding(binding)

    def _value(self, name: str, memory: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Any:
        kind = self.tensors[name].kind
        array = memory[name].view(_DTYPES[kind]).reshape(shapes[name])
        if kind == "BF16":
            return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, _BFLOAT16)
        return onnxruntime.OrtValue.ortvalue_from_numpy(array)
