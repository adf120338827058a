"""Runs a sharp twin on ONNX Runtime's CPU provider, without any rewriting or arranging of weights by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qconvert.errors import QconvertError
from qrun.folder.external_data import DATA_FOLDER, with_data_from_root
from qrun.folder.manifest import Manifest
from qrun.machine import usable_cores


class TwinSession:
    """One sequence through a twin, from its beginning.

    Args:
        model: of ``twin.sharp_twin``.
        folder: where its data file lies.
        manifest: the folder's facts.

    Raises:
        QconvertError: ONNX Runtime does not open or run it.
    """

    def __init__(self, model: ir.Model, folder: Path, manifest: Manifest) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = usable_cores()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.enable_mem_pattern = False
        # No constant folding, no prepacking: a dequantised matrix lives as long as its product takes.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.add_session_config_entry(DATA_FOLDER, folder.resolve().anchor)
        self._name = model.graph.name or "graph"
        content = with_data_from_root(ir.serde.serialize_model(model).SerializeToString(), folder)
        try:
            self._inference: Any = onnxruntime.InferenceSession(
                content, options, providers=["CPUExecutionProvider"], enable_fallback=False
            )
        except Exception as error:  # ONNX Runtime has no base class for its errors
            raise self._failed("opened", error, folder) from error
        self._folder = folder
        self._static = manifest.target == "tensorrt"
        facts = manifest.model
        self._length = facts.context_length if self._static else 0
        self._kv_shape = (1, facts.num_key_value_heads, self._length, facts.head_size)
        self._layers = facts.num_hidden_layers
        self.outputs = [output.name for output in self._inference.get_outputs()]
        self._inputs = {entry.name for entry in self._inference.get_inputs()}

    def empty_cache(self) -> dict[str, NDArray[np.float32]]:
        """Keys and values ``[1, kv_heads, length, head_size]`` of no token yet, by "{layer}.{part}"."""
        return {
            f"{layer}.{part}": np.zeros(self._kv_shape, dtype=np.float32)
            for layer in range(self._layers)
            for part in ("key", "value")
        }

    def run(
        self, token_ids: NDArray[np.int64], cache: dict[str, NDArray[np.float32]], filled: int
    ) -> dict[str, NDArray[np.float32]]:
        """All outputs for tokens ``[new]`` behind ``filled`` others; logits are for every new one."""
        new = len(token_ids)
        given: dict[str, Any] = {"input_ids": token_ids[None]}
        if self._static:
            given["position_ids"] = np.arange(filled, filled + new, dtype=np.int64)[None]
            given["logits_positions"] = np.arange(new, dtype=np.int64)
        else:
            given["attention_mask"] = np.ones((1, filled + new), dtype=np.int64)
        given |= {f"past_key_values.{name}": array for name, array in cache.items()}
        try:
            values = self._inference.run(None, given)
        except Exception as error:  # as above
            raise self._failed("run", error, self._folder) from error
        return dict(zip(self.outputs, values))

    def advance(
        self, token_ids: NDArray[np.int64], cache: dict[str, NDArray[np.float32]], filled: int
    ) -> NDArray[np.float32]:
        """Logits ``[new, vocab]``; the cache takes up the new tokens."""
        found = self.run(token_ids, cache, filled)
        cache.update({name: found[f"present.{name}"] for name in cache})
        logits: NDArray[np.float32] = found["logits"][0]
        return logits

    def _failed(self, what: str, error: Exception, folder: Path) -> QconvertError:
        return QconvertError(
            f"the sharp twin of the graph cannot be {what}: {str(error).splitlines()[0]}",
            where=folder,
            hint="export the model again",
        )
