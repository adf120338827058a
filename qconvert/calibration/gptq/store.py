"""Rounded weights on disk, one file a layer, beside the output: an interrupted export resumes from them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from qconvert import __version__
from qconvert.folder.beside import hidden_name, stores_beside
from qconvert.folder.ours import remove_files
from qconvert.folder.tensors import save_tensors
from qconvert.formats.layout import PackedWeight
from qconvert.formats.recipe import Recipe

_PART_FILE = re.compile(r"(\d+|head)\.(safetensors|unfinished)")
_PARTS = ("data", "scales", "zero_points")
Place = int | Literal["head"]
# What is no layer's.
HEAD: Literal["head"] = "head"


class RoundedWeights(Mapping[str, PackedWeight]):
    """Packed weights by their names in the checkpoint, read when they are asked for.

    Args:
        output: the model folder to be; the store is a hidden folder beside it.
        source_hashes: of the checkpoint's files.
        recipe: with its calibration. Another one, or another checkpoint, has another store.
    """

    def __init__(self, output: Path, source_hashes: Mapping[str, str], recipe: Recipe) -> None:
        key = json.dumps([__version__, dict(source_hashes), recipe.to_json()], sort_keys=True)
        self._output = output
        digest = hashlib.sha256(key.encode()).hexdigest()[:16]
        self.folder = output.with_name(hidden_name(output, f"rounded-{digest}"))

    def layer(self, index: Place) -> dict[str, PackedWeight] | None:
        """The weights of a layer, or of ``HEAD``, that was finished before, or None."""
        file = self._file(index)
        return {name: self._read(file, name) for name in self._names(file)} if file.is_file() else None

    def add_layer(self, index: Place, weights: Mapping[str, PackedWeight]) -> None:
        """Keep a layer, or ``HEAD``: its file appears whole, by one rename.

        Raises:
            OSError: no space left, or whatever else the disk says.
        """
        tensors = {
            f"{name}:{part}": tensor
            for name, packed in weights.items()
            for part in _PARTS
            if (tensor := getattr(packed, part)) is not None
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.folder / f"{index}.unfinished"
        try:
            save_tensors(tensors, unfinished)
        except OSError:
            with suppress(OSError):  # without a first layer there is nothing to go on from
                self.folder.rmdir()
            raise
        unfinished.replace(self._file(index))

    def remove(self) -> None:
        """Delete this store, and those that exports to the same output with other options have left."""
        for folder in stores_beside(self._output, "rounded"):
            # Only files of layers are deleted: the folder stays if it holds anything else.
            remove_files(folder, [file.name for file in folder.iterdir() if _PART_FILE.fullmatch(file.name)])

    def __getitem__(self, name: str) -> PackedWeight:
        file = self._file_of(name)
        if file is None or name not in self:
            raise KeyError(name)
        return self._read(file, name)

    def __contains__(self, name: object) -> bool:
        file = self._file_of(str(name))
        return file is not None and name in self._names(file)

    def __iter__(self) -> Iterator[str]:
        for file in sorted(self.folder.glob("*.safetensors")):
            yield from self._names(file)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _file(self, index: Place) -> Path:
        return self.folder / f"{index}.safetensors"

    def _file_of(self, name: str) -> Path | None:
        parts = name.split(".")  # model.layers.INDEX.
        file = self._file(int(parts[2]) if len(parts) > 2 and parts[2].isdigit() else "head")
        return file if file.is_file() else None

    def _names(self, file: Path) -> list[str]:
        with _opened(file) as tensors:
            return sorted({key.partition(":")[0] for key in tensors.keys()})  # noqa: SIM118

    def _read(self, file: Path, name: str) -> PackedWeight:
        with _opened(file) as tensors:
            keys, zeros = set(tensors.keys()), f"{name}:zero_points"
            return PackedWeight(
                tensors.get_tensor(f"{name}:data"),
                tensors.get_tensor(f"{name}:scales"),
                tensors.get_tensor(zeros) if zeros in keys else None,
            )


def _opened(file: Path) -> Any:
    from safetensors import safe_open

    return safe_open(file, "pt")
