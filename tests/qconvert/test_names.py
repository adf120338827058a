"""If these fail, a name that leads nowhere (no such home, links in a circle) ends qconvert in a traceback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.qconvert.building import run

NAMES = ("~nosuchuser/m", "loop", "n" * 300, "file/m", "\udcff\udce9", "")
# Where a command takes a name, all others being right. None of them may get as far as the work.
PLACES: dict[str, Callable[[str, Path], tuple[object, ...]]] = {
    "inspect": lambda name, _: ("inspect", name),
    "export": lambda name, _: ("export", name),
    "output": lambda name, tied: ("export", tied, "--output", name, "--no-verify"),
    "calibrate": lambda name, tied: ("export", tied, "--precision", "int4", "--calibrate", name),
    "verify": lambda name, tied: ("verify", name, "--reference", tied),
    "build": lambda name, _: ("build", name),
    "sample": lambda name, tied: ("sample", name, "--wheel", tied / "config.json"),
    "wheel": lambda name, tied: ("sample", tied.parent / "sample", "--wheel", name),
}
GOOD_OUTPUTS = ("\udcff\udce9", "")  # not UTF-8, which is a name; the folder's own


@pytest.mark.parametrize(
    ("place", "name"),
    [(place, name) for place in PLACES for name in NAMES if not (place == "output" and name in GOOD_OUTPUTS)],
)
def test_a_name_that_leads_to_no_file_is_refused_in_one_message(
    place: str, name: str, tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # For a home that does not exist and for links in a circle, Python raises RuntimeError and not OSError.
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = sorted(path.name for path in tmp_path.iterdir())
    done = run(*PLACES[place](name, tied))
    assert isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code in (1, 2)
    assert done.output.lower().count("error:") == 1, done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == before
