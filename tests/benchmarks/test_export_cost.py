"""Exports in turn: if this fails, the times of docs/figures.md cannot be measured again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.tiny import make_tiny_checkpoint

ROOT = Path(__file__).resolve().parents[2]


def test_recipes_of_ones_own_are_exported_in_turn(tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "model")
    command = [sys.executable, "-m", "benchmarks.export_cost", "--own", str(checkpoint), "--runs", "2"]
    command += ["--options", "int8", "int4 --recipe rtn", "--work", str(tmp_path / "work")]
    file = tmp_path / "found.json"
    done = subprocess.run(
        [*command, "--json", str(file)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text(encoding="utf-8"))
    assert set(found["programs"]) == {"int8", "int4 --recipe rtn"}
    for program in found["programs"].values():
        assert program["wall_seconds"]["runs"] == 2
    assert str(tmp_path) not in json.dumps(found["commands"])
    assert "| int8 |" in done.stdout
    assert not any((tmp_path / "work").glob("*/model*"))
