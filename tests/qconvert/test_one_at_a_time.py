"""If one of these fails, two programs at once write to one place, and one's work is lost without a word."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qconvert.folder.lock import only_changer, only_user
from qconvert.tensorrt import plan
from tests.qconvert.building import TinyExports, names, refused, run

HOLD = """
import sys, time
from pathlib import Path
from qconvert.folder.lock import only_changer, only_user
with {lock}(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_plan_is_built_by_one_at_a_time(folder: Path) -> None:
    # Both wrote .model.plan.tmp, and what was published was a mixture.
    before = names(folder)
    with only_changer(folder):
        refused(run("build", folder, "--compute-capability", "8.9"), f"another qconvert is changing {folder}")
    assert names(folder) == before


def test_a_timing_cache_has_one_user_at_a_time(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "check_options", lambda *_, **__: None)  # a cache is for builds on a GPU
    cache = tmp_path / "timings"
    with only_user(cache):
        result = run("build", folder, "--compute-capability", "8.9", "--timing-cache", cache)
        refused(result, f"another qconvert is using {cache}", "name another file")
    assert not cache.exists()
    cache.write_bytes(b"measured")
    with only_user(cache):
        pass
    assert cache.read_bytes() == b"measured"


def test_a_report_is_written_by_one_at_a_time(
    folder: Path, tied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qconvert.proof.finished.load_model", lambda _: pytest.fail("the work has begun"))
    with only_changer(folder):
        result = run("verify", folder, "--reference", tied, "--write")
        refused(result, f"another qconvert is changing {folder}", "wait until it has ended")


def test_reading_alone_waits_for_nobody(exported: TinyExports, folder: Path) -> None:
    checkpoint = next(exported("bf16").parent.glob("checkpoint*"))
    with only_changer(folder):
        assert run("verify", folder, "--reference", checkpoint).exit_code == 0


@pytest.mark.parametrize("moment", ["before the work", "at the end"])
def test_an_export_does_not_replace_a_folder_that_is_being_changed(
    folder: Path, tied: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    before = names(folder)
    arguments = ("export", tied, "--output", folder, "--force", "--no-verify")
    if moment == "before the work":
        monkeypatch.setattr("qconvert.export.load_model", lambda _: pytest.fail("the work has begun"))
        with only_changer(folder):
            refused(run(*arguments), f"another qconvert is changing {folder}")
    else:
        import qconvert.export

        write, changers = qconvert.export.write_companions, []

        def meanwhile(*args: object, **options: object) -> None:
            write(*args, **options)  # type: ignore[arg-type]
            changers.append(only_changer(folder))
            changers[0].__enter__()

        monkeypatch.setattr(qconvert.export, "write_companions", meanwhile)
        refused(run(*arguments), f"another qconvert is changing {folder}")
        changers[0].__exit__(None, None, None)
    assert names(folder) == before


@pytest.mark.parametrize("lock", ["only_changer", "only_user"])
def test_a_killed_program_blocks_nobody(tmp_path: Path, lock: str) -> None:
    place = tmp_path / "place"
    if lock == "only_changer":
        place.mkdir()
    held = {"only_changer": only_changer, "only_user": only_user}[lock]
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(lock=lock), place], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(Exception, match="another qconvert is"), held(place):
        pass
    holder.kill()
    holder.wait()
    with held(place):
        pass
