"""Ways to break a checkpoint, and the check of how it is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from qconvert.checkpoint.load import open_checkpoint
from qconvert.cli import main
from qconvert.errors import QconvertError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 3087467144\n"


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def refusal(folder: Path) -> QconvertError:
    """The error of opening the folder, which must leave the folder as it was."""
    before = sorted((path.name, path.lstat().st_size) for path in folder.parent.rglob("*"))
    with pytest.raises(QconvertError) as caught:
        open_checkpoint(folder)
    assert sorted((path.name, path.lstat().st_size) for path in folder.parent.rglob("*")) == before
    return caught.value


def told(tmp_path: Path, *options: str) -> str:
    """The message of an export that is refused; everything around it stays as it was."""
    before = sorted((str(path), path.lstat().st_size) for path in tmp_path.rglob("*"))
    command = ["export", str(tmp_path / "model"), "-o", str(tmp_path / "out"), "--no-verify", *options]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), result.exception  # anything else is a traceback
    assert sorted((str(path), path.lstat().st_size) for path in tmp_path.rglob("*")) == before
    assert "what to do" in result.output
    return " ".join(result.output.split())
