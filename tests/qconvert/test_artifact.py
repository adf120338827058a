"""A model folder appears by one rename, complete, or not at all."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch

from qconvert.errors import QconvertError
from qconvert.folder.artifact import check_replaceable, new_model_folder, remove_files
from qconvert.lowering.data_file import DataFile
from qrun.folder.entry import sha256_of
from qrun.folder.manifest import MANIFEST_NAME


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def build(output: Path, content: str = "new", *, force: bool = False, needed: int = 0) -> None:
    with new_model_folder(output, force=force, needed_bytes=needed) as folder:
        (folder.path / "weights").write_text(content)
        folder.write_manifest({})
        folder.publish()


def test_the_manifest_lists_every_other_file(tmp_path: Path) -> None:
    build(tmp_path / "model")
    files = json.loads((tmp_path / "model" / MANIFEST_NAME).read_text())["files"]
    assert [(entry["path"], entry["size"]) for entry in files] == [("weights", 3)]
    assert names(tmp_path) == ["model"]


def test_a_failure_leaves_nothing_not_even_new_parents(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError),
        new_model_folder(tmp_path / "a" / "b" / "model", force=False, needed_bytes=0),
    ):
        raise RuntimeError
    assert names(tmp_path) == []


def test_an_existing_folder_is_refused_and_untouched(tmp_path: Path) -> None:
    build(tmp_path / "model", "old")
    with pytest.raises(QconvertError, match=r"exists already(.|\n)*--force"):
        build(tmp_path / "model")
    assert (tmp_path / "model" / "weights").read_text() == "old"


def test_force_replaces_the_whole_folder(tmp_path: Path) -> None:
    with new_model_folder(tmp_path / "model", force=False, needed_bytes=0) as folder:
        (folder.path / "old").mkdir()
        (folder.path / "old" / "extra").write_text("of the old one")
        folder.write_manifest({})
        folder.publish()
    build(tmp_path / "model", "new", force=True)
    assert names(tmp_path / "model") == [MANIFEST_NAME, "weights"]
    assert names(tmp_path) == ["model"]


def test_a_failed_replacement_keeps_the_old_folder(tmp_path: Path) -> None:
    build(tmp_path / "model", "old")
    with pytest.raises(RuntimeError), new_model_folder(tmp_path / "model", force=True, needed_bytes=0):
        raise RuntimeError
    assert (tmp_path / "model" / "weights").read_text() == "old"
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("ending", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize(
    ("moment", "left"), [("remove_files", "new"), ("check_replaceable", "old"), ("shutil.rmtree", "old")]
)
def test_ctrl_c_and_sigterm_leave_one_whole_folder_and_nothing_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: type[BaseException], moment: str, left: str
) -> None:
    """SIGTERM while the replaced export was deleted left its files for ever, under a hidden name."""
    build(tmp_path / "model", "old")
    whole = {"remove_files": remove_files, "check_replaceable": check_replaceable}.get(moment, shutil.rmtree)
    strikes = [ending()]

    def struck(path: Path, *arguments: Any, **options: Any) -> Any:
        if strikes and path.name != "model":  # the check before the swap is of the name "model"
            raise strikes.pop()
        return whole(path, *arguments, **options)

    def replace() -> None:
        with new_model_folder(tmp_path / "model", force=True, needed_bytes=0) as folder:
            if moment == "shutil.rmtree":
                raise RuntimeError
            (folder.path / "weights").write_text("new")
            folder.write_manifest({})
            folder.publish()

    monkeypatch.setattr(f"qconvert.folder.artifact.{moment}", struck)
    with pytest.raises(ending):
        replace()
    assert not strikes
    assert (tmp_path / "model" / "weights").read_text() == left
    assert names(tmp_path) == ["model"]


def test_without_renameat2_the_old_folder_is_still_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path / "model", "old")
    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: object())
    build(tmp_path / "model", "new", force=True)
    assert (tmp_path / "model" / "weights").read_text() == "new"
    assert names(tmp_path) == ["model"]


def test_force_does_not_delete_what_qconvert_did_not_make(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "dear.jpg").write_text("x")
    with pytest.raises(QconvertError, match="did not make"):
        build(tmp_path / "photos", force=True)
    assert (tmp_path / "photos" / "dear.jpg").read_text() == "x"


def test_a_file_of_that_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("a file")
    with pytest.raises(QconvertError, match="not a folder"):
        build(tmp_path / "model", force=True)


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path) -> None:
    needed = shutil.disk_usage(tmp_path).total + 1
    with pytest.raises(QconvertError, match=r"GB are needed and .* GB are free"):
        build(tmp_path / "model", needed=needed)
    assert names(tmp_path) == []


def test_a_disk_that_fills_up_while_writing_is_one_clear_message(tmp_path: Path) -> None:
    with (
        pytest.raises(QconvertError, match="no space left on the disk"),
        new_model_folder(tmp_path / "model", force=False, needed_bytes=0),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert names(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_the_data_file_notices_a_full_device() -> None:
    with DataFile(Path("/dev/full")) as data, pytest.raises(OSError, match=r"space|requested"):
        data.add("w", [torch.zeros(1 << 16)], (1 << 16,), ir.DataType.FLOAT)


def write_some(path: Path, told: dict[str, str]) -> None:
    with DataFile(path, lambda path, digest: told.update({path.name: digest})) as data:
        data.add("w", [torch.arange(9.0), torch.ones(3)], (12,), ir.DataType.FLOAT)
        data.add("v", [torch.ones(5, dtype=torch.bfloat16)], (5,), ir.DataType.BFLOAT16)
        with data.beside("other") as other:
            other.add("w", [torch.arange(4)], (4,), ir.DataType.INT64)


def test_a_data_file_tells_its_hash_and_that_of_others_beside_it(tmp_path: Path) -> None:
    told: dict[str, str] = {}
    write_some(tmp_path / "data", told)
    assert told == {name: sha256_of(tmp_path / name) for name in ("data", "other")}


def test_a_data_file_that_fails_tells_nothing(tmp_path: Path) -> None:
    told: dict[str, str] = {}
    with (
        pytest.raises(ZeroDivisionError),
        DataFile(tmp_path / "data", lambda path, digest: told.update({path.name: digest})),
    ):
        raise ZeroDivisionError
    assert told == {}


def test_a_hash_that_was_noted_is_for_the_content_that_the_file_had(tmp_path: Path) -> None:
    def listed() -> str:
        folder.write_manifest({})
        return str(json.loads((folder.path / MANIFEST_NAME).read_text())["files"][0]["sha256"])

    with new_model_folder(tmp_path / "model", force=False, needed_bytes=0) as folder:
        file = folder.path / "weights"
        file.write_text("old")
        folder.note_hash(file, "of the old")
        assert listed() == "of the old"
        file.write_text("newer")
        assert listed() == sha256_of(file)


def test_an_unwritable_parent_is_one_clear_message(tmp_path: Path) -> None:
    # A path through a file cannot be made by anybody, root included.
    (tmp_path / "file").write_text("")
    with pytest.raises(QconvertError, match="cannot write"):
        build(tmp_path / "file" / "model")


def test_leftovers_of_a_killed_export_are_removed_by_the_next(tmp_path: Path) -> None:
    # The name is no pattern: model[v2] was one to the glob that looked for leftovers, and matched nothing.
    output = tmp_path / "model[v2]"
    program = (
        "import os, pathlib, sys; from qconvert.folder.artifact import new_model_folder\n"
        "with new_model_folder(pathlib.Path(sys.argv[1]), force=False, needed_bytes=0) as folder:\n"
        "    (folder.path / 'weights').write_text('half'); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", program, str(output)], check=False)
    left = names(tmp_path)
    assert [name[:14] for name in left] == [".model[v2].qco", ".model[v2].tmp"]
    build(output)
    assert names(tmp_path) == ["model[v2]"]


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    build(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    build(tmp_path / "link", "new", force=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "weights").read_text() == "new"
