"""If one of these fails, a disk that is full ends a command in words that nobody understands."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors import SafetensorError

from qconvert.folder.tensors import save_tensors
from qconvert.lowering.data_file import DataFile
from tests.qconvert.building import refused, run


class SlowFile:
    """A file that takes a few bytes at a time, as a disk that is nearly full or a signal leaves them."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.written = b""

    def write(self, content: memoryview) -> int:
        if len(self.written) == self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = bytes(content[: min(7, self.room - len(self.written))])
        self.written += taken
        return len(taken)

    def close(self) -> None: ...


def test_a_tensor_is_written_whole_however_little_the_system_takes_at_once(tmp_path: Path) -> None:
    data = DataFile(tmp_path / "data")
    data._file = SlowFile(1 << 20)  # type: ignore[assignment]
    pieces = torch.arange(50, dtype=torch.float32).split(20)
    data.add("t", pieces, (50,), ir.DataType.FLOAT)
    data.add("b", [torch.ones(3, dtype=torch.bfloat16)], (3,), ir.DataType.BFLOAT16)
    assert data._file.written[:200] == np.arange(50, dtype=np.float32).tobytes()  # type: ignore[attr-defined]
    assert data._file.written[256:] == b"\x80\x3f" * 3  # type: ignore[attr-defined]


def test_a_full_disk_is_told_with_its_reason(tmp_path: Path) -> None:
    # NumPy said "2048 requested and 0 written", without a number or a name.
    data = DataFile(tmp_path / "data")
    data._file = SlowFile(100)  # type: ignore[assignment]
    with pytest.raises(OSError, match="No space left") as caught:
        data.add("t", [torch.zeros(50)], (50,), ir.DataType.FLOAT)
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("options", [("int8",), ("int4", "--recipe", "gptq"), ("int4", "--prefill", "int8")])
def test_an_export_onto_a_full_disk(
    tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    def full(self: DataFile, padding: int, tensors: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(DataFile, "_write", full)
    result = run("export", tied, "--precision", *options, "--output", tmp_path / "m", "--no-verify")
    refused(result, "no space left on the disk", "free some space")
    assert not (tmp_path / "m").exists()


def test_rounded_weights_onto_a_full_disk(
    tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # safetensors has an error of its own, which ended in a traceback.
    def full(tensors: object, path: Path, metadata: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    result = run("export", tied, "--precision", "int4", "--recipe", "gptq", "--output", tmp_path / "m")
    refused(result, "no space left on the disk", "free some space", "rounded-")
    assert not (tmp_path / "m").exists()


def test_the_number_of_a_systems_error_is_found_in_the_words_of_safetensors(tmp_path: Path) -> None:
    # The library itself, whose words may change: a folder that is not there, one in the file's place.
    with pytest.raises(FileNotFoundError):
        save_tensors({"t": torch.zeros(2)}, tmp_path / "absent" / "t.safetensors")
    (tmp_path / "t.safetensors").mkdir()
    with pytest.raises(IsADirectoryError):
        save_tensors({"t": torch.zeros(2)}, tmp_path / "t.safetensors")


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    """balance.safetensors of every int4 export could be read by its owner alone, unlike its neighbours."""
    beside = tmp_path / "beside"
    beside.touch()
    for _ in range(2):  # a new file, and one that is replaced
        save_tensors({"t": torch.zeros(2)}, tmp_path / "t.safetensors")
        assert (tmp_path / "t.safetensors").stat().st_mode == beside.stat().st_mode


@pytest.mark.parametrize(
    ("options", "most"),
    # gptq keeps layers that it has finished, to go on from there: here not even the first one fits.
    [("int8", 40_000), ("int4", 40_000), ("int4", 20_000), ("int4 --recipe gptq", 20_000), ("fp32", 40_000)],
)
def test_a_limit_to_the_size_of_files(tied: Path, tmp_path: Path, options: str, most: int) -> None:
    command = ["export", str(tied), "-q", "--output", str(tmp_path / "m"), "--precision", *options.split()]
    done = subprocess.run(
        [sys.executable, "-m", "qconvert.cli", *command],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)),
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "File too large" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tied"]
