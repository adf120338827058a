"""If one of these fails, an error or Ctrl-C waits until a checkpoint of many gigabytes is hashed."""

from __future__ import annotations

from concurrent.futures import CancelledError
from pathlib import Path

import pytest

from qconvert.checkpoint import hashing
from qconvert.checkpoint.hashing import hash_files, hashed_meanwhile


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_leaving_early_does_not_wait_for_the_hashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    # Leaving the pool waited for all files: each of these would be read for ever.
    monkeypatch.setattr(hashing, "_READ_BYTES", 1)
    path = Path("/dev/zero")
    with pytest.raises(error), hashed_meanwhile([path]) as hashes:
        raise error
    with pytest.raises(CancelledError):
        hashes.result(timeout=0)


def test_a_stop_is_asked_for_between_the_pieces(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * (9 << 20))
    asked = iter([False, False, True])
    with pytest.raises(CancelledError):
        hash_files([tmp_path / "file"], lambda: next(asked))
    assert next(asked, None) is None


def test_hashes_that_are_asked_for_are_whole(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    with hashed_meanwhile([tmp_path / "file"]) as hashes:
        found = hashes.result()
    assert found == hash_files([tmp_path / "file"])
