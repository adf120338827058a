"""If these fail, a job does not go on where it was, or with another's answers, or touches a user's file."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from qrun.batch.asking import Defaults
from qrun.batch.journal import SUFFIX, Journal
from qrun.batch.opening import Wanted
from qrun.batch.order import Order
from qrun.batch.running import run
from qrun.errors import QrunError
from tests.batch.jobs import beside, read_lines, request, work, write_lines
from tests.batch.typing_in import type_in
from tests.fakes import REPOSITORY, fed_tokens


class Stop(Exception):
    """In place of a kill: what was answered is kept."""


def stopping_at(count: int):
    def watch(progress) -> None:
        if progress.done >= count:
            raise Stop

    return watch


@pytest.fixture
def stopped(model, tmp_path):
    """A job of 9 lines, stopped after 4 of them; its source and its output."""
    source = write_lines(tmp_path / "in.jsonl", [request(f"{n}", f"say {n}") for n in range(9)])
    output = tmp_path / "out.jsonl"
    with pytest.raises(Stop):
        run(Order(source, output, rows=2), model, stopping_at(4))
    return source, output


def test_a_job_goes_on_and_answers_nothing_twice(model, stopped, tmp_path):
    source, output = stopped
    assert not output.exists()
    fed_tokens(model)
    summary = work(model, source, output, rows=8)
    # A prompt of these has 24 tokens and its answer 5, of which the last is not fed.
    assert fed_tokens(model) < 5 * 32
    assert (summary["lines"], summary["answered"], summary["answered_before_this_start"]) == (9, 9, 4)
    work(model, source, tmp_path / "whole.jsonl")
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert beside(output) == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"defaults": Defaults(seed=3)}, "seed"),
        ({"defaults": Defaults(max_tokens=3)}, "max_tokens"),
        ({"defaults": Defaults(fields={"temperature": 0.5})}, "temperature"),
        ({"wanted": Wanted(column="custom_id")}, "column"),
        ({"unordered": True}, "unordered"),
    ],
    ids=["seed", "max_tokens", "temperature", "column", "unordered"],
)
def test_another_job_is_refused_and_keeps_what_the_first_has(model, stopped, change, named):
    source, output = stopped
    answers = output.with_name(output.name + SUFFIX) / "answers"
    before = answers.read_bytes()
    with pytest.raises(QrunError, match=f"it had another .*{named}"):
        work(model, source, output, **change)
    assert answers.read_bytes() == before
    assert work(model, source, output)["answered_before_this_start"] == 4


def test_another_input_or_model_is_refused(model, stopped, tokenizer):
    source, output = stopped
    text = source.read_text()
    source.write_text(text.replace("say 8", "say 9"))
    with pytest.raises(QrunError, match="another input"):
        work(model, source, output)
    source.write_text(text)
    model.session.manifest.raw["name"] = "another"
    with pytest.raises(QrunError, match="another model"):
        work(model, source, output)


def test_force_starts_over(model, stopped):
    source, output = stopped
    assert work(model, source, output, force=True)["answered_before_this_start"] == 0
    output.write_text("an older one")
    assert work(model, source, output, force=True)["answered"] == 9
    assert len(read_lines(output)) == 9


def test_force_that_is_refused_loses_nothing(model, stopped):
    source, output = stopped
    with pytest.raises(QrunError, match="no column"):
        work(model, source, output, force=True, wanted=Wanted(column="nothing"))
    assert work(model, source, output)["answered_before_this_start"] == 4


def test_an_output_that_appears_meanwhile_is_left_alone(model, stopped):
    source, output = stopped
    output.write_text("mine")
    with pytest.raises(QrunError, match="left as it is"):
        work(model, source, output)
    assert output.read_text() == "mine"
    output.unlink()

    def appear(progress) -> None:
        output.write_text("mine")

    with pytest.raises(QrunError, match="left as it is"):
        run(Order(source, output, rows=2), model, appear)
    assert output.read_text() == "mine"
    output.unlink()
    assert work(model, source, output)["answered_before_this_start"] == 9


def test_an_output_that_is_to_be_replaced_may_not_change_meanwhile(model, stopped):
    source, output = stopped
    output.write_text("older")
    with pytest.raises(Stop):
        run(Order(source, output, rows=2, force=True), model, stopping_at(4))
    output.write_text("newer, and mine")
    with pytest.raises(QrunError, match="left as it is"):
        work(model, source, output)
    assert output.read_text() == "newer, and mine"


def test_a_growing_output_that_somebody_has_changed_is_left_alone(model, tmp_path):
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": f"say {n}"} for n in range(9)])
    output = tmp_path / "out.csv"
    with pytest.raises(Stop):
        run(Order(source, output, rows=2, unordered=True), model, stopping_at(4))
    content = output.read_bytes()
    assert content.count(b"\n") == 5  # it grows by whole lines below its header
    output.write_bytes(content.replace(b"say", b"SAY"))
    with pytest.raises(QrunError, match="left as it is"):
        work(model, source, output, unordered=True)
    assert output.read_bytes() == content.replace(b"say", b"SAY")
    output.write_bytes(content)
    assert work(model, source, output, unordered=True)["answered_before_this_start"] == 4


def test_a_job_of_which_nothing_was_answered_holds_nobody_up(model, tmp_path):
    """A kill amid the first prompt would have refused the command with a mended option."""
    source = write_lines(tmp_path / "in.jsonl", [request("a", "say it")])
    output = tmp_path / "out.jsonl"
    journal = Journal(output)
    journal.write_job({"job": {"input": "another"}, "replaces": None})
    journal.release()
    assert work(model, source, output)["answered"] == 1


def test_a_disk_without_links(model, stopped, monkeypatch):
    source, output = stopped

    def no_links(path, target) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("pathlib.Path.hardlink_to", no_links)
    assert work(model, source, output)["answered"] == 9
    assert len(read_lines(output)) == 9
    assert beside(output) == []


def test_two_commands_on_one_output(model, stopped):
    source, output = stopped
    journal = Journal(output)
    try:
        with pytest.raises(QrunError, match="another `qrun batch` is writing"):
            work(model, source, output)
    finally:
        journal.release()
    assert work(model, source, output)["answered_before_this_start"] == 4


def test_too_many_errors_stop_the_job_and_more_may_be_allowed_later(model, tmp_path):
    lines = [request(f"{n}", f"say {n}", **({"nonsense": 1} if n in (2, 3, 4) else {})) for n in range(9)]
    source, output = write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    with pytest.raises(QrunError, match="2 lines could not be answered, and --max-errors is 1"):
        work(model, source, output, max_errors=1)
    with pytest.raises(QrunError, match="1 line could not be answered, and --max-errors is 0"):
        work(model, source, tmp_path / "other.jsonl", max_errors=0)
    assert not output.exists()
    summary = work(model, source, output, max_errors=3)
    assert (summary["answered"], summary["errors"]) == (6, {"invalid_request": 3})


def test_a_full_disk_loses_nothing(model, stopped, monkeypatch):
    source, output = stopped

    class Full:
        def __init__(self, file) -> None:
            self._file = file

        def __getattr__(self, name):
            return getattr(self._file, name)

        def write(self, content):
            self._file.write(content[: len(content) // 2])
            raise OSError(28, "No space left on device")

    opened = Journal.open

    def full(journal) -> None:
        opened(journal)
        journal._file = Full(journal._file)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "open", full)
        with pytest.raises(OSError, match="No space"):
            work(model, source, output)
    assert work(model, source, output)["answered_before_this_start"] == 4


def test_a_pipe_goes_on_with_the_same_input_only(model, stopped, tmp_path):
    source, _ = stopped
    output = tmp_path / "piped.jsonl"
    with source.open("rb") as pipe, pytest.raises(Stop):
        run(Order(None, output, pipe=pipe, rows=2), model, stopping_at(3))
    with (tmp_path / "in.jsonl").open("rb") as pipe:
        pipe.readline()
        with pytest.raises(QrunError, match="another input"):
            work(model, None, output, pipe=pipe)
    with source.open("rb") as pipe:
        assert work(model, None, output, pipe=pipe)["answered_before_this_start"] == 3


def test_the_summary_for_people_and_for_programs(monkeypatch, model, tmp_path):
    source = write_lines(tmp_path / "in.jsonl", [request("a", "hello"), request("b", "x", nonsense=1)])
    done = type_in(monkeypatch, model, source, "--output", tmp_path / "a.jsonl")
    assert "2 lines: 1 answered, 1 with an error" in done.stdout
    assert max(map(len, done.stdout.splitlines()[:-1])) <= 80
    done = type_in(monkeypatch, model, source, "--output", tmp_path / "b.jsonl", "--json", "--rows", 2)
    summary = json.loads(done.stdout)
    assert summary["errors"] == {"invalid_request": 1}
    assert (summary["lines"], summary["rows"], summary["completion_tokens"]) == (2, 2, 5)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


@pytest.mark.parametrize("signal", ["SIGINT", "SIGTERM"])
def test_ctrl_c_says_how_to_go_on(signal, tmp_path):
    source = write_lines(tmp_path / "in.jsonl", [request(f"{n}", f"say {n} " * 9) for n in range(60)])
    output = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "tests.batch.fake_command", source, "--output", output, "--rows", "2"]
    code = (
        "import os, runpy, signal, sys, threading, time\n"
        # Whoever starts the tests behind nohup has told its children to ignore Ctrl-C.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def kill():\n"
        # Three answers: between the writing and the counting of the first there is a moment.
        f"    kept = {str(output) + SUFFIX + '/answers'!r}\n"
        "    while not (os.path.exists(kept) and open(kept, 'rb').read().count(b'\\n') > 2):\n"
        "        time.sleep(0.01)\n"
        f"    os.kill(os.getpid(), signal.{signal})\n"
        "threading.Thread(target=kill, daemon=True).start()\n"
        f"sys.argv = {['x', *map(str, command[3:])]!r}\n"
        "runpy.run_module('tests.batch.fake_command', run_name='__main__')\n"
    )
    env = {"QRUN_FAKE_STEP": "0.005", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 130, done.stderr
    assert "lines are answered and kept; the same command goes on from there" in done.stderr
    assert "Traceback" not in done.stderr
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "are answered already" in done.stderr
    assert len(read_lines(output)) == 60
