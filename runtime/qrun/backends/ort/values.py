"""Memory that ONNX Runtime reads and writes: its values over arrays of ours, and buffers of the KV cache.

On the CPU a value shares an array's memory and does not keep it alive: whoever binds an array must keep it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qrun.folder.manifest import Manifest

_POSITIONS = {"last": -1, "all": 0, "none": np.iinfo(np.int64).max}


class Values:
    """What the caches of a session need to know of it, and how they get memory on its device.

    Attributes:
        manifest: of the model.
        kv_names: of the buffers, such as "0.key", in the graph's order.
        kv_dtype: of keys and values. NumPy has no bfloat16, whose bits are kept as integers.
        on_cpu: whether values share the memory of arrays.

    Args:
        runtime: the module ``onnxruntime``.
        device: "cpu", "cuda" or "tensorrt".
    """

    def __init__(self, runtime: Any, manifest: Manifest, device: str) -> None:
        self.manifest = manifest
        self.on_cpu = device == "cpu"
        self.device_type = "cpu" if self.on_cpu else "cuda"
        self.kv_dtype = np.dtype({"bfloat16": "uint16"}.get(manifest.kv.dtype, manifest.kv.dtype))
        layers = range(manifest.model.num_hidden_layers)
        self.kv_names = [f"{layer}.{part}" for layer in layers for part in ("key", "value")]
        self.runtime = runtime
        self._starts = {name: np.array([start], dtype=np.int64) for name, start in _POSITIONS.items()}
        self._positions = {name: self.value(array) for name, array in self._starts.items()}
        self._booleans = [np.array(on) for on in (False, True)]
        self._flags = [self.value(array) for array in self._booleans]

    def value(self, array: NDArray[Any]) -> Any:
        """A value over an array in the machine's memory, which the caller keeps."""
        return self.runtime.OrtValue.ortvalue_from_numpy(array)

    def positions(self, logits: str) -> Any:
        """The first position whose logits are wanted, for "last", "all" or "none"."""
        return self._positions[logits]

    def flag(self, *, on: bool) -> Any:
        """A bool scalar."""
        return self._flags[on]

    def allocate(self, array: NDArray[Any]) -> Any:
        """A value on the session's device: on the CPU it shares the array's memory."""
        return self.runtime.OrtValue.ortvalue_from_numpy(array, self.device_type)


class Buffer:
    """Keys or values of one layer, ``[rows, kv_heads, capacity, head_size]``, zeroed.

    Pages of a zeroed array take no memory until they are written. On a GPU the array is what was last read
    from there.

    Raises:
        MemoryError: the system has no room for it.
    """

    def __init__(self, values: Values, shape: tuple[int, ...]) -> None:
        self._values = values
        self._array: NDArray[Any] = np.zeros(shape, dtype=values.kv_dtype)
        self._value = values.allocate(self._array)

    def read(self, row: int, length: int) -> NDArray[Any]:
        """The first ``length`` states of a row, ``[kv_heads, length, head_size]``; on the CPU not a copy."""
        return self._current()[row, :, :length]

    def write(self, row: int, start: int, states: NDArray[Any]) -> None:
        """Put states ``[kv_heads, new, head_size]`` into a row from position ``start`` on."""
        array = self._current()
        array[row, :, start : start + states.shape[1]] = states
        if not self._values.on_cpu:
            self._value.update_inplace(array)

    def bind(self, binding: Any, name: str, first: int, count: int, *, present: bool) -> None:
        """Bind some rows as a layer's past, and as its present too: the graph writes where it reads.

        Rows next to each other are next to each other in memory, so that no copy is needed.
        """
        rows, *_ = shape = self._array.shape
        if count == rows:
            binding.bind_ortvalue_input(f"past_key_values.{name}", self._value)
            if present:
                binding.bind_ortvalue_output(f"present.{name}", self._value)
            return
        # Bound by address, since only on the CPU a value can be made over a part of another one.
        address = self._value.data_ptr() + first * self._array.strides[0]
        part = (self._values.device_type, 0, self._array.dtype.type, (count, *shape[1:]), address)
        binding.bind_input(f"past_key_values.{name}", *part)
        if present:
            binding.bind_output(f"present.{name}", *part)

    def numpy(self) -> NDArray[Any]:
        """All of it; on the CPU not a copy."""
        return self._current()

    def _current(self) -> NDArray[Any]:
        if not self._values.on_cpu:
            self._array = self._value.numpy()
        return self._array
