"""The tensors of the weight files as they are stored, mapped one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qconvert.checkpoint.files import TensorInfo
from qconvert.checkpoint.header import DTYPE_BITS
from qconvert.checkpoint.weights import drop_pages
from qconvert.errors import QconvertError

if TYPE_CHECKING:
    import torch


class TensorFiles(Mapping[str, TensorInfo]):
    """What headers say of the tensors in a folder, and their contents when they are asked for.

    Args:
        folder: the checkpoint's.
        tensors: by name.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, TensorInfo]) -> None:
        self.folder = folder
        self._tensors = tensors
        self._open: dict[str, Any] = {}

    def __getitem__(self, name: str) -> TensorInfo:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def read(self, name: str) -> torch.Tensor:
        """A tensor in its own type, mapped privately.

        Raises:
            QconvertError: the file has changed since its header was read.
        """
        from safetensors import SafetensorError, safe_open

        file = self[name].file
        try:
            if file not in self._open:
                self._open[file] = safe_open(self.folder / file, "pt")
            found: torch.Tensor = self._open[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise QconvertError(
                f"{name} cannot be read: {error}", where=self.folder / file, hint="download the file again"
            ) from error
        return found

    def release(self, *names: str) -> None:
        """Their mapped pages may leave memory."""
        for name in names:
            drop_pages(self.read(name))

    def bytes_of(self, *names: str) -> int:
        """What these take on disk."""
        total = 0
        for name in names:
            bits = DTYPE_BITS[self[name].dtype]
            for length in self[name].shape:
                bits *= length
            total += bits // 8
        return total

    def expect(self, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> None:
        """Check what a header says.

        Raises:
            QconvertError: there is no such tensor, or it is of another type or shape.
        """
        if name not in self:
            raise QconvertError(
                f"{name} is missing", where=self.folder, hint="download the whole checkpoint again"
            )
        info = self[name]
        if info.dtype not in dtypes or info.shape != shape:
            raise QconvertError(
                f"{name} is {info.dtype} {list(info.shape)}, due is {' or '.join(dtypes)} {list(shape)}",
                where=self.folder / info.file,
                hint="config.json is not that of these weights: download the whole checkpoint again",
            )
