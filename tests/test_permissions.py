"""If these fail, a file that is closed to the user ends a command in a traceback or with a wrong remedy."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.qconvert.building import run
from tests.tiny import make_tiny_checkpoint
from tests.unprivileged import commands

CLOSED, READ_ONLY, NAMES_ALONE = 0o000, 0o555, 0o444
PERMISSIONS = "check the permissions of the file and of the folders above it"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and an export of it."""
    root = tmp_path_factory.mktemp("made")
    checkpoint = make_tiny_checkpoint(root / "checkpoint")
    assert run("export", checkpoint, "--output", root / "model", "--no-verify").exit_code == 0
    return checkpoint, root / "model"


def copies_with_one_file_closed(folder: Path, root: Path) -> list[Path]:
    copies = []
    for file in sorted(path.name for path in folder.iterdir()):
        copies.append(Path(shutil.copytree(folder, root / f"without {file}")))
        (copies[-1] / file).chmod(CLOSED)
    return copies


def test_a_checkpoint_s_file_that_may_not_be_read(made: tuple[Path, Path], tmp_path: Path) -> None:
    copies = copies_with_one_file_closed(made[0], tmp_path)
    assert len(copies) >= 5
    lines = [
        line
        for copy in copies
        for line in (
            ("qconvert", "inspect", copy),
            ("qconvert", "export", copy, "--output", tmp_path / "m", "--no-verify"),
        )
    ]
    for line, done in zip(lines, commands(*lines)):
        assert (done.error, done.exit_code) == (None, 1), line
        assert "Permission denied" in done.output
        assert PERMISSIONS in done.output
    assert not (tmp_path / "m").exists()


def test_an_export_s_file_that_may_not_be_read(made: tuple[Path, Path], tmp_path: Path) -> None:
    # It was "ONNX Runtime cannot open the graph: SystemError : 13", with the advice to update it.
    copies = copies_with_one_file_closed(made[1], tmp_path)
    assert len(copies) >= 7
    lines = [
        line
        for copy in copies
        for line in (
            ("qrun", "info", copy),
            ("qrun", "generate", "--engine", copy, "--prompt", "x", "--max-tokens", "1"),
            ("qconvert", "verify", copy, "--reference", made[0]),
        )
    ]
    for line, done in zip(lines, commands(*lines)):
        assert (done.error, done.exit_code) == (None, 1), line
        assert "may not be read" in done.output or "Permission denied" in done.output
        assert PERMISSIONS in done.output, done.output


def test_folders_that_are_closed_or_read_only(made: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint, model = made
    above = tmp_path / "above"
    closed = Path(shutil.copytree(model, above / "closed"))
    shutil.copytree(checkpoint, above / "checkpoint")
    names_alone = Path(shutil.copytree(model, tmp_path / "names alone"))
    read_only = tmp_path / "read-only"
    read_only.mkdir()
    kept = Path(shutil.copytree(model, tmp_path / "kept"))
    closed.chmod(CLOSED)
    above.chmod(CLOSED)
    names_alone.chmod(NAMES_ALONE)
    read_only.chmod(READ_ONLY)
    kept.chmod(READ_ONLY)
    before = sorted(path.name for path in tmp_path.iterdir())
    export = ("qconvert", "export", checkpoint, "--no-verify", "--output")
    lines = [
        ("qconvert", "inspect", above / "checkpoint"),
        ("qconvert", "export", above / "checkpoint", "--output", tmp_path / "m"),
        (*export, above / "m"),
        (*export, above / "new" / "m"),
        (*export, read_only / "m"),
        (*export, kept, "--force"),
        ("qconvert", "sample", read_only / "sample"),
        ("qconvert", "verify", kept, "--reference", above / "checkpoint"),
        ("qconvert", "verify", kept, "--reference", checkpoint, "--write"),
        ("qrun", "info", above / "closed"),
        ("qrun", "generate", "--engine", above / "closed", "--prompt", "x"),
        ("qrun", "chat", "--engine", names_alone),
    ]
    ended = commands(*lines)
    above.chmod(0o755)
    for line, done in zip(lines, ended):
        assert done.error is None, line
        assert done.exit_code in (1, 2)  # click's own check of a path is wrong usage
        assert done.output.lower().count("error:") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert "is read-only, and --force would delete what is in it" in ended[5].output


def test_these_tests_may_read_no_more_than_an_ordinary_user(tmp_path: Path) -> None:
    """Root may read every file, so as root the tests above would show nothing."""
    (tmp_path / "closed").write_text("x")
    (tmp_path / "closed").chmod(CLOSED)
    (done,) = commands(("qrun", "generate", "--engine", tmp_path, "--prompt-file", tmp_path / "closed"))
    assert "is not readable" in done.output
