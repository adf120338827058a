"""Tensors into which adapters were merged, held against the adapters' own files.

What an export is compared with is merged by the same code as what is exported: an error there would agree
with itself. So some rows of every such tensor are computed here a second time, in float64, from the files.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qconvert.checkpoint.load import Checkpoint
from qconvert.checkpoint.weights import CheckpointWeights
from qconvert.proof.weight_check import WeightFault

# float32 sums of some hundred products of numbers near 1.
_TOLERANCE = 1e-5
_ROWS = 16
_PEFT = "base_model.model."


def check_adapters(source: Checkpoint, model: Any) -> Iterator[WeightFault]:
    """Faults of the tensors that adapters change.

    Args:
        source: the checkpoint with its adapters.
        model: the same, loaded.
    """
    import torch

    merged = CheckpointWeights(model)
    adapters = [(_Adapter(folder), weight) for folder, weight in source.merged_folders]
    changed = [name for name in source.computed if any(adapter.has(name) for adapter, _ in adapters)]
    plain = _Files([source.folder / info.file for info in source.tensors.values()])
    for name in changed:
        rows = torch.linspace(0, merged.shape(name)[0] - 1, _ROWS).long()
        before = getattr(source.computed[name], "quantised", None)
        due = plain.tensor(name)[rows].double() if before is None else before.rows(rows).double()
        for adapter, weight in adapters:
            due = adapter.apply(name, due, rows, weight)
        found = merged.rows(name, rows).double()
        off = float((found - due).abs().max()) / max(1.0, float(due.abs().max()))
        if not off <= _TOLERANCE:
            yield WeightFault(name, f"adapters are merged wrongly: off by {off:.3g} of the largest value")


class _Files:
    """Tensors of safetensors files, by name."""

    def __init__(self, paths: list[Path]) -> None:
        from safetensors import safe_open

        found = {path for path in paths if path.suffix == ".safetensors"}
        opened: list[Any] = [safe_open(path, "pt") for path in sorted(found)]
        self._places: dict[str, Any] = {name: file for file in opened for name in file.keys()}  # noqa: SIM118

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def tensor(self, name: str) -> Any:
        """A tensor, mapped."""
        return self._places[name].get_tensor(name)


class _Adapter:
    """One adapter, read as peft documents it."""

    def __init__(self, folder: Path) -> None:
        self._config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text("utf-8-sig"))
        self._files = _Files([folder / "adapter_model.safetensors"])

    def has(self, name: str) -> bool:
        """Whether it changes a tensor."""
        return any(each in self._files for each in (*self._names(name)[:2], *self._whole(name)))

    def apply(self, name: str, before: Any, rows: Any, weight: float) -> Any:
        """Some rows, float64, with what it does to them."""
        for whole in self._whole(name):
            if whole in self._files:
                before = self._files.tensor(whole)[rows].double()
        first, embedded, second = self._names(name)
        if first in self._files:
            down, up = (self._files.tensor(each).double() for each in (first, second))
            return before + weight * self._scale(name, down.shape[0]) * (up[rows] @ down)
        if embedded in self._files:
            down = self._files.tensor(embedded).double()
            up = self._files.tensor(embedded[:-1] + "B").double()
            return before + weight * self._scale(name, down.shape[0]) * (down[:, rows].t() @ up.t())
        return before

    def _names(self, name: str) -> tuple[str, str, str]:
        module = _PEFT + name.rpartition(".")[0]
        return f"{module}.lora_A.weight", f"{module}.lora_embedding_A", f"{module}.lora_B.weight"

    def _whole(self, name: str) -> tuple[str, str]:
        module, _, kind = name.rpartition(".")
        return f"{_PEFT}{name}", f"{_PEFT}{module}.base_layer.{kind}"

    def _scale(self, name: str, rank: int) -> float:
        module = name.rpartition(".")[0]
        alpha = float(self._config["lora_alpha"])
        for pattern, value in (self._config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = float(value)
                break
        return alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)
