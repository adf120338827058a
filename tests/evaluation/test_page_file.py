"""If these fail, hours of an evaluation are lost with its page, or a file of the user's with it."""

from __future__ import annotations

import hashlib
import json
import os
from threading import Thread

import pytest

from tests.commands import qrun, refused
from tests.evaluation.writing import TASK, data

GREEDY = ("--threads", 1, "--max-tokens", 4)


def test_what_was_found_is_shown_when_the_page_cannot_be_written(tmp_path, tiny_export, monkeypatch):
    path, page = data(tmp_path / "data.jsonl", TASK), tmp_path / "page.html"

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.mkstemp", full)
    done = qrun("eval", "--engine", tiny_export, path, *GREEDY, "--json", "--page", page)
    assert done.exit_code == 1
    assert "No space left" in done.stderr
    assert json.loads(done.stdout)["lines"]
    assert not page.exists()


def test_a_disk_without_links_has_its_page(tmp_path, tiny_export, monkeypatch):
    path, page = data(tmp_path / "data.jsonl", TASK), tmp_path / "page.html"

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    assert qrun("eval", "--engine", tiny_export, path, *GREEDY, "--page", page).exit_code == 0
    assert page.read_text().startswith("<!doctype html>")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["data.jsonl", "page.html"]


def test_the_page_is_not_the_data(tmp_path, tiny_export):
    path = data(tmp_path / "data.jsonl", TASK)
    before = path.read_bytes()
    said = refused(qrun("eval", "--engine", tiny_export, path, "--page", path, "--force"))
    assert "--page is the file of the data" in said
    assert path.read_bytes() == before
    page = tmp_path / "page.html"
    page.symlink_to(tmp_path / "away" / "page.html")
    assert "a link to nowhere" in refused(qrun("eval", "--engine", tiny_export, path, "--page", page))


@pytest.mark.timeout(120)
def test_data_from_a_pipe_is_read_once_and_its_hash_is_told(tmp_path, tiny_export):
    """It was read a second time for its hash: a pipe hung there, and a file could be another by then."""
    pipe, content = tmp_path / "pipe", data(tmp_path / "data.jsonl", TASK).read_bytes()
    os.mkfifo(pipe)
    Thread(target=lambda: pipe.write_bytes(content), daemon=True).start()
    done = qrun("eval", "--engine", tiny_export, pipe, *GREEDY, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["sha256"] == hashlib.sha256(content).hexdigest()


def test_a_line_that_another_folder_cannot_take_costs_no_time(tmp_path, tiny_export, exporter, monkeypatch):
    """It was found when the first folder had answered everything, and all of that was lost."""
    short = exporter("int8", max_position_embeddings=128)
    path = data(tmp_path / "data.jsonl", TASK, {"prompt": "a" * 500, "expected": "b"})
    opened: list[object] = []
    monkeypatch.setattr("qrun.cli.eval.open_model", lambda **options: opened.append(options))
    said = refused(qrun("eval", "--engine", tiny_export, "--against", short, path))
    assert "line 2 (line 2) cannot be asked" in said
    assert str(short) in said
    assert opened == []
