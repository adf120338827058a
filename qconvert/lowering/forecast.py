"""What the data files of an export will hold, found by lowering the decoder as an export does, without data.

Every tensor is asked for, laid out and aligned by the code that writes it: the bytes are those of the files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qconvert.formats.folding import Folding, folded_inputs
from qconvert.formats.layout import Layout
from qconvert.formats.recipe import Recipe
from qconvert.formats.stored import kv_scale_name
from qconvert.lowering.data_file import DATA_NAME, DataFile
from qconvert.lowering.initializers import Initializers
from qconvert.models.recorder import expected_tensors
from qconvert.models.spec import DecoderSpec

Lower = Callable[[DecoderSpec, Recipe, Initializers, Any], object]


def data_bytes(lower: Lower, spec: DecoderSpec, recipe: Recipe) -> dict[str, int]:
    """The size of each data file by its name.

    Args:
        lower: of the export's target.
        spec: the decoder as the target will run it.
        recipe: what becomes of its weights.
    """
    files: dict[str, int] = {}
    weights = _Weights(spec)
    with _Counted(Path(DATA_NAME), files) as data:
        initializers = _Sizes(weights, data, folding=_Folded.of_recipe(recipe, spec.num_hidden_layers))
        if recipe.kv_cache is not None:
            for layer in range(spec.num_hidden_layers):
                for part in ("key", "value"):
                    initializers.constant(kv_scale_name(layer, part), np.empty(1, dtype=np.float32))
        table = np.empty((spec.context_length, spec.head_size // 2), dtype=np.float32)
        lower(spec, recipe, initializers, (table, table))
    return files


class _Folded(Folding):
    """A folding that is known by the names of its tensors; their shapes stay what they are."""

    @classmethod
    def of_recipe(cls, recipe: Recipe, layers: int) -> Folding:
        """What a recipe's graph of integer products has in a folded form."""
        fmt = recipe.integer_products
        smooth = fmt is not None and fmt.smoothing is not None
        inputs = [found for layer in range(layers if smooth else 0) for found in folded_inputs(layer)]
        return cls.of_inputs({found: torch.empty(0) for found in inputs})

    def apply(self, name: str, rows: torch.Tensor, start: int = 0) -> torch.Tensor:
        return rows


class _Weights(dict[str, torch.Tensor]):
    """The checkpoint's tensors, of which only the shapes are known."""

    def __init__(self, spec: DecoderSpec) -> None:
        shapes = expected_tensors(spec)
        super().__init__((name, torch.empty(shape, device="meta")) for name, shape in shapes.items())

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self[name].shape)

    def release(self, name: str) -> None:
        """Nothing is held."""


class _Sizes(Initializers):
    """Initializers whose contents are never computed."""

    def _contents(self, names: Sequence[str], layout: Layout) -> Iterable[Iterable[torch.Tensor]]:
        columns = self._weights.shape(names[0])[1]
        return [()] * len(layout.parts(sum(self._weights.shape(name)[0] for name in names), columns))

    def _order(self, name: str) -> torch.Tensor:
        return torch.empty(self._weights.shape(name)[1], dtype=torch.int32)


class _Counted(DataFile):
    """A data file that is not written; its size is put into ``files`` when it is closed."""

    def __init__(self, path: Path, files: dict[str, int]) -> None:
        self.path, self.size, self._files = path, 0, files

    def __exit__(self, *exc: object) -> None:
        self._files[self.path.name] = self.size

    def beside(self, name: str) -> DataFile:
        return _Counted(self.path.with_name(name), self._files)

    def _write(self, padding: int, tensors: Iterable[torch.Tensor]) -> None:
        """Nothing: the tensors are not even computed."""
