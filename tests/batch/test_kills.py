"""If these fail, a machine that restarts costs answers: lost, doubled, cut in half, or other ones.

``QRUN_BATCH_KILLS`` is how often the command is killed (6); ``make test-kills`` asks for 100.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qrun.batch.journal import SUFFIX
from qrun.batch.opening import Wanted
from qrun.errors import QrunError
from tests.batch.jobs import beside, read_lines, request, work, write_lines
from tests.batch.kills import killed_at
from tests.fakes import REPOSITORY

KILLS = int(os.environ.get("QRUN_BATCH_KILLS", "6"))


def hundreds(path: Path, count: int) -> Path:
    """Requests of all kinds: sampled and greedy, long and short, two that cannot be answered."""
    shared = "one beginning for many prompts " * 12
    lines = [
        request(
            f"line-{n}",
            (shared if n % 3 else "") + f"say {n} " * (n % 7 + 1),
            temperature=n % 2,
            max_tokens=24,
        )
        for n in range(count)
    ]
    lines[5]["body"]["nonsense"] = 1
    write_lines(path, lines)
    with path.open("a") as file:
        file.write('{"custom_id": "half a li')
    return path


@pytest.mark.parametrize("unordered", [False, True] if KILLS >= 100 else [False])
@pytest.mark.timeout(1800)
def test_a_command_that_is_killed_again_and_again(tmp_path, unordered):
    """Killed by -9 after a random time and started again, until it is done: as if nothing had happened."""
    source = hundreds(tmp_path / "requests.jsonl", 1000 if KILLS >= 100 else 250)
    extra = ["--unordered"] if unordered else []
    command = [sys.executable, "-m", "tests.batch.fake_command", str(source), "--rows", "8", *extra]
    whole, output = tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
    subprocess.run([*command, "--output", whole], check=True, cwd=REPOSITORY, capture_output=True)

    chance, kills, kept = random.Random(KILLS), 0, 0
    env = {**os.environ, "QRUN_FAKE_STEP": "0.004" if KILLS < 100 else "0.006"}
    while True:
        running = subprocess.Popen(
            [*command, "--output", output], cwd=REPOSITORY, env=env, stdout=subprocess.PIPE
        )
        try:
            # Importing takes about half a second, so that some kills come before anything is done.
            wait = None if kills == KILLS else chance.uniform(0.3, 1.1)
            assert running.wait(wait) == 0
            break
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()
            kills += 1
        journal = output.with_name(output.name + SUFFIX) / "answers"
        now = journal.read_bytes().count(b"\n") if journal.exists() else 0
        assert now >= kept, "answers were lost"
        kept = now
    assert kills >= min(KILLS, 5), "it was too fast to be killed"
    assert beside(output) == []
    if unordered:
        assert sorted(output.read_bytes().splitlines()) == sorted(whole.read_bytes().splitlines())
    else:
        assert output.read_bytes() == whole.read_bytes()
    assert len(read_lines(output)) == len(source.read_bytes().splitlines())


@pytest.mark.parametrize("kind", ["ordered", "unordered", "csv", "force", "parquet", "pipe"])
def test_a_kill_before_any_step_on_the_disk(model, tmp_path, kind):
    """Between two steps on the disk every state is one that a kill can leave; each of them goes on."""
    source = write_lines(tmp_path / "in.jsonl", [{"id": n, "text": f"say\n{n}"} for n in range(3)])
    suffix = {"csv": "csv", "parquet": "parquet"}.get(kind, "jsonl")
    whole = tmp_path / f"whole.{suffix}"
    wanted = Wanted(column="text", format="jsonl")
    work(model, source, whole, wanted=wanted)
    unordered = kind in ("unordered", "csv")
    step, killed = 0, True
    while killed:
        place = tmp_path / f"{kind}-{step}"
        place.mkdir()
        output = place / f"out.{suffix}"
        if kind == "force":
            output.write_text("an older output")

        def start(output: Path = output, force: bool = kind == "force") -> None:
            given = {"unordered": unordered, "force": force}
            if kind != "pipe":
                work(model, source, output, wanted=wanted, **given)
                return
            with source.open("rb") as pipe:
                work(model, None, output, wanted=wanted, pipe=pipe)

        killed = killed_at(step, place, start)
        refusal = ""
        try:
            start(force=False)
        except QrunError as error:
            refusal = error.what
        if refusal:  # all was done but the removal of an empty folder; or --force had not begun
            assert "exists already" in refusal
            assert beside(output) == []
            if output.read_bytes() == b"an older output":
                start()
        content = output.read_bytes()
        if unordered:
            assert sorted(content.splitlines()) == sorted(whole.read_bytes().splitlines()), step
        else:
            assert content == whole.read_bytes(), step
        assert beside(output) == [], step
        step += 1
    assert step > 20


@pytest.mark.parametrize("unordered", [False, True], ids=["ordered", "unordered"])
def test_half_an_entry_is_cut_off_and_answered_again(model, tmp_path, unordered):
    """A kill amid a write, or a machine that has lost its power, leaves part of what was written last."""
    source = write_lines(tmp_path / "in.jsonl", [request(f"{n}", f"say {n}") for n in range(6)])
    whole = tmp_path / "whole.jsonl"
    work(model, source, whole, unordered=unordered)

    class Stop(Exception):
        pass

    def stop(progress) -> None:
        if progress.done == 4:
            raise Stop

    from qrun.batch.order import Order
    from qrun.batch.running import run

    for cut in (0, 1, 7, 60):
        output = tmp_path / f"out-{cut}.jsonl"
        with pytest.raises(Stop):
            run(Order(source, output, rows=4, unordered=unordered), model, stop)
        answers = output.with_name(output.name + SUFFIX) / "answers"
        os.truncate(answers, answers.stat().st_size - cut)
        if not cut:  # a byte that the disk has lost, in what is JSON all the same
            content = answers.read_bytes()
            place = content.rindex(b"say")
            answers.write_bytes(content[:place] + b"pay" + content[place + 3 :])
        summary = work(model, source, output, unordered=unordered)
        assert summary["answered_before_this_start"] == 3
        assert sorted(output.read_bytes().splitlines()) == sorted(whole.read_bytes().splitlines())
        if not unordered:
            assert output.read_bytes() == whole.read_bytes()
        assert beside(output) == []


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_a_real_model_gives_the_same_bytes_after_kills(exporter, tmp_path, precision):
    """Sampled answers beside other neighbours, from other rows and after other cached beginnings."""
    sizes = {} if precision == "fp32" else {"block_size": 128, "hidden_size": 256, "intermediate_size": 512}
    folder = exporter(precision, max_position_embeddings=1024, **sizes)
    source = hundreds(tmp_path / "requests.jsonl", 90)
    command = [sys.executable, "-m", "qrun.cli", "batch", "--engine", str(folder), "--threads", "1"]
    command += [str(source), "--max-tokens", "24", "--rows"]
    whole, output = tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
    subprocess.run([*command, "3", "--output", whole], check=True, cwd=REPOSITORY, capture_output=True)
    answers = output.with_name(output.name + SUFFIX) / "answers"
    for rows, enough in (("8", 20), ("1", 40), ("5", 60)):
        running = subprocess.Popen(
            [*command, rows, "--output", output], cwd=REPOSITORY, stderr=subprocess.DEVNULL
        )
        while not (answers.exists() and answers.read_bytes().count(b"\n") >= enough):
            assert running.poll() is None
            time.sleep(0.002)
        running.kill()
        running.wait()
    subprocess.run([*command, "16", "--output", output], check=True, cwd=REPOSITORY, capture_output=True)
    assert output.read_bytes() == whole.read_bytes()
    assert beside(output) == []
