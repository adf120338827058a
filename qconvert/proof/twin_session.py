"""Runs a sharp twin on ONNX Runtime's CPU provider, without any rewriting or arranging of weights by it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qconvert.errors import QconvertError
from qconvert.formats.stored import BY_GROUPS
from qrun.folder.external_data import DATA_FOLDER, with_data_from_root
from qrun.folder.manifest import Manifest
from qrun.machine import usable_cores

# Places at the end of a cache that attention by groups must not see, and what stands in them.
_BEYOND = 3
_STALE = 7.0


class TwinSession:
    """Sequences side by side through a twin, from their beginnings.

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
        # An arena would keep the memory of every dequantised matrix that it has seen.
        options.enable_cpu_mem_arena = False
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
        self._heads, self._head_size = facts.num_key_value_heads, facts.head_size
        self._layers = facts.num_hidden_layers
        self.outputs = [output.name for output in self._inference.get_outputs()]
        defaults = self._inference.get_overridable_initializers()
        self.has_groups = any(entry.name == BY_GROUPS for entry in defaults)

    def empty_cache(self, rows: int = 1) -> dict[str, NDArray[np.float32]]:
        """Keys and values ``[rows, kv_heads, length, head_size]`` of no token yet, by "{layer}.{part}"."""
        shape = (rows, self._heads, self._length, self._head_size)
        return {
            f"{layer}.{part}": np.zeros(shape, dtype=np.float32)
            for layer in range(self._layers)
            for part in ("key", "value")
        }

    def run(
        self,
        sequences: Sequence[NDArray[np.int64]],
        cache: dict[str, NDArray[np.float32]],
        filled: Sequence[int],
        *,
        by_groups: bool = False,
    ) -> dict[str, NDArray[np.float32]]:
        """All outputs for the next tokens of every row, ``filled`` others of which came before.

        Shorter rows are filled up after their last token; logits are for every place. ``by_groups`` is for
        one token of each row: the cache then gets places that no row has filled, with numbers in them.
        """
        new = max(map(len, sequences))
        padded = np.zeros((len(sequences), new), dtype=np.int64)
        for row, tokens in zip(padded, sequences):
            row[: len(tokens)] = tokens
        given: dict[str, Any] = {"input_ids": padded}
        if self._static:
            given["position_ids"] = np.arange(filled[0], filled[0] + new, dtype=np.int64)[None]
            given["logits_positions"] = np.arange(new, dtype=np.int64)
        else:
            totals = np.array([before + len(tokens) for before, tokens in zip(filled, sequences)])
            given["attention_mask"] = (np.arange(max(filled) + new) < totals[:, None]).astype(np.int64)
        if by_groups:
            given[BY_GROUPS] = np.array(True)
            places = ((0, 0), (0, 0), (0, 1 + _BEYOND), (0, 0))
            cache = {name: np.pad(array, places, constant_values=_STALE) for name, array in cache.items()}
        given |= {f"past_key_values.{name}": array for name, array in cache.items()}
        try:
            values = self._inference.run(None, given)
        except Exception as error:  # as above
            raise self._failed("run", error, self._folder) from error
        found = dict(zip(self.outputs, values))
        if by_groups:
            found |= {f"present.{name}": found[f"present.{name}"][:, :, :-_BEYOND] for name in cache}
        return found

    def advance(
        self,
        sequences: Sequence[NDArray[np.int64]],
        cache: dict[str, NDArray[np.float32]],
        filled: Sequence[int],
        *,
        by_groups: bool = False,
    ) -> list[NDArray[np.float32]]:
        """Logits ``[new, vocab]`` of every row; the cache takes up the new tokens."""
        found = self.run(sequences, cache, filled, by_groups=by_groups)
        cache.update({name: found[f"present.{name}"] for name in cache})
        return [rows[: len(tokens)] for rows, tokens in zip(found["logits"], sequences)]

    def _failed(self, what: str, error: Exception, folder: Path) -> QconvertError:
        return QconvertError(
            f"the sharp twin of the graph cannot be {what}: {str(error).splitlines()[0]}",
            where=folder,
            hint="export the model again",
        )
