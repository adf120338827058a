"""Resuming: if keys are wrong, a report mixes settings, or work is done twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.compare.records import Records, StepFailedError, file_name

KEY = {"peer": "llama_cpp", "variant": "Q4_0", "shape": "0.5b", "round": 1, "threads": 2}


def test_the_same_key_is_worked_on_once(tmp_path: Path) -> None:
    calls = []

    def work() -> dict[str, Any]:
        calls.append(1)
        return {"value": 5}

    for _ in range(2):
        found = Records(tmp_path).once("measurement", KEY, work)
        assert found["value"] == 5
    assert calls == [1]


def test_another_setting_round_or_kind_is_another_record() -> None:
    names = {file_name("measurement", {**KEY, "threads": threads}) for threads in (1, 2)}
    names |= {file_name("measurement", {**KEY, "round": 2}), file_name("conversion", KEY)}
    assert len(names) == 4
    assert file_name("measurement", KEY).startswith("measurement-llama_cpp-Q4_0-0.5b-1-")
    assert file_name("measurement", dict(reversed(KEY.items()))) == file_name("measurement", KEY)


def test_a_failure_stands_until_it_is_retried(tmp_path: Path) -> None:
    calls = []

    def fail() -> dict[str, Any]:
        calls.append(1)
        raise StepFailedError("no wheel for this machine")

    assert Records(tmp_path).once("environment", KEY, fail)["failed"] == "no wheel for this machine"
    Records(tmp_path).once("environment", KEY, fail)
    assert calls == [1]
    retrying = Records(tmp_path, retry_failed=True)
    retrying.once("environment", KEY, fail)
    retrying.once("environment", KEY, fail)  # once per run, although asked for in every round
    assert calls == [1, 1]
    assert Records(tmp_path, retry_failed=True).once("environment", KEY, lambda: {"ok": 1})["ok"] == 1


def test_a_broken_record_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / file_name("measurement", KEY)).write_text('{"key":')
    assert Records(tmp_path).once("measurement", KEY, lambda: {"value": 1})["value"] == 1
    saved = json.loads((tmp_path / file_name("measurement", KEY)).read_text())
    assert (saved["key"], saved["value"]) == (KEY, 1)
    assert not list(tmp_path.glob("*.part"))


def test_an_interruption_leaves_no_record(tmp_path: Path) -> None:
    def interrupted() -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Records(tmp_path).once("measurement", KEY, interrupted)
    assert Records(tmp_path).read("measurement", KEY) is None


def test_a_new_export_forgets_what_was_recorded_of_the_one_that_it_replaces(tmp_path: Path) -> None:
    """Two checkouts in turn over one folder: the older record stood for files of the newer export."""
    key = {"peer": "qconvert", "variant": "int4", "shape": "0.5b", "source": "old"}
    other = {**key, "variant": "int4-prefill8"}
    records = Records(tmp_path)
    for each in (key, other):
        records.once("conversion", each, lambda: {})
    records.forget("conversion", {**key, "source": "new"})
    assert records.read("conversion", key) is None
    assert records.read("conversion", other) is not None
