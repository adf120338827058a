"""If these fail, a folder is published that no qrun command opens, or is refused after minutes of work."""

from __future__ import annotations

from pathlib import Path

import pytest

from qconvert.checkpoint.load import load_model, open_checkpoint
from qconvert.checkpoint.reference import Reference
from qconvert.errors import QconvertError
from qconvert.export import ExportOptions, export
from qconvert.progress import Progress
from qconvert.proof import finished
from qconvert.proof.verify import verify
from tests.qconvert.mutants import reseal
from tests.tiny import make_tiny_checkpoint

QUIET = Progress(quiet=True)


def test_a_broken_chat_template_fails_the_verification(tied: Path, tmp_path: Path) -> None:
    options = ExportOptions("int8", output=tmp_path / "m", verify=False)
    folder = export(str(tied), options, QUIET).folder
    (folder / "chat_template.jinja").write_text("{% for message in %}", encoding="utf-8")
    reseal(folder)
    checkpoint = open_checkpoint(tied)
    report = verify(folder, checkpoint, Reference(load_model(checkpoint)), QUIET)
    assert "opening the folder as a user does" in report.failures()
    assert "chat_template.jinja" in report.failures()


@pytest.mark.parametrize("context", [2, 3, 4, 8])
@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_a_short_context_is_verified_with_what_fits(tmp_path: Path, context: int, precision: str) -> None:
    """The tokens that are cut off again did not fit: the verification ended in "9 tokens do not fit"."""
    source = make_tiny_checkpoint(tmp_path / "c", max_position_embeddings=context)
    made = export(str(source), ExportOptions(precision, output=tmp_path / "m"), QUIET)
    assert made.report is not None
    assert made.report.passed


def test_write_into_a_read_only_folder_is_refused_before_the_work(
    tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ExportOptions("int8", output=tmp_path / "m", verify=False)
    folder = export(str(tied), options, QUIET).folder
    monkeypatch.setattr(finished.os, "access", lambda *_: False)  # tests may run as root
    monkeypatch.setattr(finished, "load_model", lambda _: pytest.fail("the checkpoint is loaded"))
    with pytest.raises(QconvertError, match="read-only"):
        finished.verify_folder(folder, str(tied), QUIET, record=True)
