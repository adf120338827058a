"""ONNX Runtime behind the session protocol.

One decode step does no allocation and no work per layer in Python: the KV buffers, the token and the
logits stay bound, only the attention mask (one longer at each step) is bound anew.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qrun.errors import QrunError
from qrun.kvcache import KVCache
from qrun.manifest import Manifest
from qrun.token_ids import check_token_ids
from qrun.wheels import check_onnxruntime_wheels

_POSITIONS = {"last": -1, "all": 0, "none": np.iinfo(np.int64).max}
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# Operators on int64 shapes and lengths, which ONNX Runtime rightly keeps on the CPU beside any device.
_SHAPE_OPERATORS = frozenset({"Shape", "Gather", "ReduceSum", "Sub", "Cast", "Slice", "Squeeze", "Unsqueeze"})


class OrtSession:
    """A model folder opened by ONNX Runtime; see ``session.Session`` for the protocol.

    Raises:
        QrunError: wrong ONNX Runtime wheels, a graph that does not load, or a device that is not there.
    """

    def __init__(self, manifest: Manifest, *, device: str, threads: int) -> None:
        check_onnxruntime_wheels(device)
        import onnxruntime

        self.manifest = manifest
        self.threads = threads
        self._ort = onnxruntime
        self._device_type = device
        self._check_provider(device, onnxruntime.get_available_providers())
        self._inference = self._open(device)
        self._check_provider(device, self._inference.get_providers())
        self._check_nodes(device)
        self.device = (
            f"CPU, {threads} thread{'s' if threads > 1 else ''}" if device == "cpu" else "CUDA device 0"
        )
        # NumPy has no bfloat16: its bits travel as integers.
        self.kv_dtype = np.dtype({"bfloat16": "uint16"}.get(manifest.kv.dtype, manifest.kv.dtype))
        facts = manifest.model
        self.kv_names = [
            f"{layer}.{part}" for layer in range(facts.num_hidden_layers) for part in ("key", "value")
        ]
        self._positions = {
            name: self._value(np.array([start], dtype=np.int64)) for name, start in _POSITIONS.items()
        }

    def new_cache(self, batch: int = 1, *, in_place: bool = True) -> OrtKVCache:
        return (InPlaceKVCache if in_place else GrowingKVCache)(self, batch)

    def forward(
        self, token_ids: NDArray[np.int64], cache: KVCache, logits: str = "last"
    ) -> NDArray[np.float32]:
        assert isinstance(cache, OrtKVCache), "the cache belongs to another session"
        batch, new = token_ids.shape
        check_token_ids(token_ids, self.manifest.model.vocab_size)
        if batch > 1 and new > 1 and cache.length > 0:
            raise QrunError(
                f"{batch} sequences cannot each take {new} more tokens in one step",
                hint="give their prompts whole, and then one token at a time: "
                "ONNX Runtime's GroupQueryAttention does nothing else for more than one sequence",
            )
        try:
            cache.reserve(new)
            binding = cache.bind(new, logits)
            cache.token_ids(new)[...] = token_ids
            self._inference.run_with_iobinding(binding)
        except QrunError:
            raise
        except Exception as error:  # ONNX Runtime has no base class for its errors
            raise QrunError(
                f"ONNX Runtime {self._ort.__version__} cannot run the graph: {_reason(error)}",
                where=self.manifest.graph_path,
                hint="check the free memory; if there is enough, export the model again",
            ) from error
        cache.collect()
        cache.advance(new)
        return cache.logits(new, logits)

    def _open(self, device: str) -> Any:
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Every shape is dynamic: remembered allocation patterns would be wrong at the next step.
        options.enable_mem_pattern = False
        if device != "cpu":
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        try:
            return self._ort.InferenceSession(
                str(self.manifest.graph_path), options, providers=[_PROVIDERS[device], "CPUExecutionProvider"]
                if device != "cpu" else ["CPUExecutionProvider"],
            )  # fmt: skip
        except Exception as error:  # ONNX Runtime has no base class for its errors
            raise QrunError(
                f"ONNX Runtime {self._ort.__version__} cannot open the graph: {_reason(error)}",
                where=self.manifest.graph_path,
                hint="check the folder with `qconvert verify`, or export the model again",
            ) from error

    @staticmethod
    def _check_provider(device: str, providers: list[str]) -> None:
        if _PROVIDERS[device] not in providers:
            raise QrunError(
                f"{_PROVIDERS[device]} is not available: ONNX Runtime would have run on the CPU instead",
                hint="check the NVIDIA driver and CUDA libraries, or use --device cpu",
            )

    def _check_nodes(self, device: str) -> None:
        if device != "cpu" and (strays := nodes_on_cpu(self._inference)):
            raise QrunError(
                f"{len(strays)} nodes would run on the CPU, not on {device}: {', '.join(strays[:5])}",
                hint="update onnxruntime-gpu, or use --device cpu",
            )

    def _value(self, array: NDArray[Any]) -> Any:
        return self._ort.OrtValue.ortvalue_from_numpy(array)

    def binding(self) -> Any:
        return self._inference.io_binding()

    def positions(self, logits: str) -> Any:
        return self._positions[logits]

    def allocate(self, array: NDArray[Any]) -> Any:
        """An OrtValue on the session's device: on the CPU it shares the array's memory."""
        return self._ort.OrtValue.ortvalue_from_numpy(array, self._device_type)


def _reason(error: Exception) -> str:
    """The first line of what ONNX Runtime says, without its prefix."""
    lines = re.sub(r"\[ONNXRuntimeError\] : \d+ : ", "", str(error)).splitlines()
    return lines[0] if lines else type(error).__name__


def nodes_on_cpu(inference: Any) -> list[str]:
    """Names of the computing nodes that a session has assigned to the CPU (see ``_SHAPE_OPERATORS``)."""
    return [
        node.name
        for subgraph in inference.get_provider_graph_assignment_info()
        if subgraph.ep_name == "CPUExecutionProvider"
        for node in subgraph.get_nodes()
        if node.op_type not in _SHAPE_OPERATORS
    ]


class OrtKVCache(KVCache):
    """What both kinds of cache share: the binding, and the buffers for tokens, mask and logits."""

    def __init__(self, session: OrtSession, batch: int) -> None:
        super().__init__(session.manifest, batch)
        self._session = session
        self._binding = session.binding()
        self._ones = np.ones((batch, 1), dtype=np.int64)
        self._tokens: NDArray[np.int64] = np.empty((batch, 0), dtype=np.int64)
        self._logits: NDArray[np.float32] = np.empty((batch, 0, 0), dtype=np.float32)
        self._bound: tuple[int, str] | None = None

    def bind(self, new: int, logits: str) -> Any:
        """Bind everything for ``new`` tokens; what has not changed since the last call stays bound."""
        if self._bound != (new, logits):
            self._bind_sizes(new, logits)
            self._bound = (new, logits)
        self._binding.bind_ortvalue_input("attention_mask", self._session._value(self._mask(new)))
        return self._binding

    def token_ids(self, new: int) -> NDArray[np.int64]:
        """The bound input buffer ``[batch, new]``, to be filled before running."""
        return self._tokens

    def logits(self, new: int, logits: str) -> NDArray[np.float32]:
        """The bound output buffer ``[batch, positions, vocab]``."""
        return self._logits

    def collect(self) -> None:
        """Take over what a run returned, where it was not written in place."""

    def _bind_sizes(self, new: int, logits: str) -> None:
        self._tokens = np.empty((self.batch, new), dtype=np.int64)
        positions = {"last": 1, "all": new, "none": 0}[logits]
        self._logits = np.empty((self.batch, positions, self.manifest.model.vocab_size), dtype=np.float32)
        self._binding.bind_ortvalue_input("input_ids", self._session._value(self._tokens))
        self._binding.bind_ortvalue_input("logits_start", self._session.positions(logits))
        self._binding.bind_ortvalue_output("logits", self._session._value(self._logits))

    def _mask(self, new: int) -> NDArray[np.int64]:
        """Ones for what each row has seen, new tokens included: int64 ``[batch, longest]``."""
        total = self.length + new
        if self.batch == 1:
            if self._ones.shape[1] < total:
                self._ones = np.ones((1, max(total, self.capacity)), dtype=np.int64)
            return self._ones[:, :total]
        return (np.arange(total) < (self.lengths + new)[:, None]).astype(np.int64)


class InPlaceKVCache(OrtKVCache):
    """Past and present are one buffer at full capacity: nothing is copied at a step."""

    def __init__(self, session: OrtSession, batch: int) -> None:
        super().__init__(session, batch)
        self._buffers: list[Any] = []

    def _reallocate(self, capacity: int) -> None:
        facts = self.manifest.model
        shape = (self.batch, facts.num_key_value_heads, capacity, facts.head_size)
        filled = self.length
        for index, name in enumerate(self._session.kv_names):
            # Pages of a zeroed array take no memory until they are written.
            grown = np.zeros(shape, dtype=self._session.kv_dtype)
            if filled:
                grown[:, :, :filled] = _as_array(self._buffers[index])[:, :, :filled]
            value = self._session.allocate(grown)
            if index < len(self._buffers):
                self._buffers[index] = value
            else:
                self._buffers.append(value)
            self._binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            self._binding.bind_ortvalue_output(f"present.{name}", value)


class GrowingKVCache(OrtKVCache):
    """Every run returns tensors that are longer by the new tokens, as optimum runs the same graph."""

    def __init__(self, session: OrtSession, batch: int) -> None:
        super().__init__(session, batch)
        facts = session.manifest.model
        empty = np.zeros((batch, facts.num_key_value_heads, 0, facts.head_size), dtype=session.kv_dtype)
        self._past: list[Any] = [session.allocate(empty) for _ in session.kv_names]

    def _reallocate(self, capacity: int) -> None:
        """Nothing to do: a run allocates what it returns."""

    def bind(self, new: int, logits: str) -> Any:
        for name, value in zip(self._session.kv_names, self._past):
            self._binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            self._binding.bind_output(f"present.{name}", self._session._device_type)
        return super().bind(new, logits)

    def collect(self) -> None:
        # Outputs come back in the order in which they were first bound: present.* before logits.
        self._past = self._binding.get_outputs()[: len(self._past)]

    def trim(self, length: int) -> None:
        super().trim(length)
        self._past = [
            self._session.allocate(np.ascontiguousarray(_as_array(value)[:, :, :length]))
            for value in self._past
        ]


def _as_array(value: Any) -> NDArray[Any]:
    array: NDArray[Any] = value.numpy()
    return array
