"""A graph with a static KV cache on ONNX Runtime's CPU provider, by which a folder for TensorRT is verified.

Such a folder holds its decoder in several graphs over the same weights; the one in standard operators can
run on the CPU. It is slow, because every step attends over the whole static cache.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qrun.backends.ort.cache import OrtKVCache
from qrun.backends.ort.session import OrtSession
from qrun.backends.ort.values import Values
from qrun.errors import QrunError
from qrun.folder.manifest import Manifest

# ONNX's numbers (TensorProto.DataType) of element types that NumPy does not have.
_ELEMENT_TYPES = {"bfloat16": 16}


def with_graph(manifest: Manifest, key: str) -> Manifest:
    """The same folder, seen as another of its graphs.

    Args:
        key: "standard_file", for the CPU; or "provider_file", for ONNX Runtime's TensorRT provider.

    Raises:
        QrunError: the manifest names no such graph, or one that is not among its files.
    """
    name = manifest.other_graphs.get(key)
    if not any(entry.path == name for entry in manifest.files):
        raise QrunError(
            f"the manifest's \"graph.{key}\" is {name!r}, which is not one of the folder's files",
            where=manifest.folder,
            hint="export the model again",
        )
    return replace(manifest, graph=str(name))


class StaticOrtSession(OrtSession):
    """A folder for TensorRT, opened by ONNX Runtime; see ``session.Session`` for the protocol.

    Raises:
        QrunError: wrong ONNX Runtime wheels, or a graph that does not load.
    """

    def __init__(self, manifest: Manifest, *, threads: int, device: str = "cpu") -> None:
        super().__init__(manifest, device=device, threads=threads)
        self.device = f"{self.device}, the standard graph of a TensorRT folder"

    def new_cache(self, batch: int = 1, *, in_place: bool = True) -> StaticKVCache:
        self.check_in_place(in_place)
        return StaticKVCache(self.values, self._inference, batch)

    def check_in_place(self, in_place: bool) -> None:
        """Refuse the kind of cache that grows."""
        if not in_place:
            raise QrunError(
                "the KV cache of this graph has a fixed length, it cannot grow",
                where=self.manifest.graph_path,
                hint="use a cache in place",
            )

    def _values(self, device: str) -> Values:
        return StaticValues(self._ort, self.manifest, device)


class StaticValues(Values):
    """Memory that may be bfloat16, which NumPy does not have."""

    def allocate(self, array: NDArray[Any]) -> Any:
        element = _ELEMENT_TYPES.get(self.manifest.kv.dtype)
        if element is None:
            return super().allocate(array)
        return self.runtime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, element)


class StaticKVCache(OrtKVCache):
    """Keys and values at the graph's full length from the start; positions say how far it is filled."""

    takes_several = True

    def __init__(self, values: Values, inference: Any, batch: int) -> None:
        super().__init__(values, inference, batch)
        self._position_ids: NDArray[np.int64] = np.empty((batch, 0), dtype=np.int64)
        self._buffers: list[NDArray[Any]] = []
        self._wanted: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def reserve(self, new_tokens: int, *, spare: int | None = None) -> None:
        fits = self.length + new_tokens <= self.limit
        super().reserve(self.limit - self.length if fits and not self.capacity else new_tokens)

    def bind(self, new: int, logits: str) -> Any:
        if self._bound != (new, logits):
            self._bind_sizes(new, logits)
            self._bound = (new, logits)
        self._position_ids[...] = self.lengths[:, None] + np.arange(new)
        return self._binding

    def _bind_sizes(self, new: int, logits: str) -> None:
        # ONNX Runtime reads and writes these arrays and does not keep them alive, so they are kept here.
        wanted = {"last": np.arange(new - 1, new), "all": np.arange(new), "none": np.arange(0)}[logits]
        self._tokens = np.empty((self.batch, new), dtype=np.int64)
        self._position_ids = np.empty((self.batch, new), dtype=np.int64)
        self._wanted = wanted.astype(np.int64)
        shape = (self.batch, len(wanted), self.manifest.model.vocab_size)
        self._logits = np.empty(shape, dtype=np.float32)
        for name, array in (
            ("input_ids", self._tokens),
            ("position_ids", self._position_ids),
            ("logits_positions", self._wanted),
        ):
            self._binding.bind_ortvalue_input(name, self.values.value(array))
        self._binding.bind_ortvalue_output("logits", self.values.value(self._logits))

    def _reallocate(self, capacity: int) -> None:
        facts = self.manifest.model
        shape = (self.batch, facts.num_key_value_heads, capacity, facts.head_size)
        # Zeros: unfilled positions are masked, but 0 times a NaN would still be NaN.
        self._buffers = [np.zeros(shape, dtype=self.values.kv_dtype) for _ in self.values.kv_names]
        for name, buffer in zip(self.values.kv_names, self._buffers):
            value = self.values.allocate(buffer)
            self._binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            self._binding.bind_ortvalue_output(f"present.{name}", value)
