"""Tensors into a safetensors file; what the disk refuses is an ``OSError``, as with any other file."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a file in PyTorch's own order of dimensions, which may be read by whom the umask allows.

    Safetensors 0.8 writes files that only their owner can read, also where it replaces another one.

    Raises:
        OSError: no space left, or whatever else the disk says.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    held = path.exists()
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
        path.chmod(mode)
    except SafetensorError as error:
        if not held:
            path.unlink(missing_ok=True)
        # The error's number is only in its text: "I/O error: No space left on device (os error 28)".
        number = re.search(r"\(os error (\d+)\)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from error
